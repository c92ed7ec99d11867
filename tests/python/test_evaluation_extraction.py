"""Answers found in texts of the shapes that models write."""

from __future__ import annotations

import pytest
from attnrb.evaluation.extraction import extract_choice, extract_number

PLANETS = ("Mars", "Venus", "Jupiter", "Saturn")

STATED = [
    ("The answer is B.", "B"),
    ("Answer: B", "B"),
    ("answer: b", "B"),
    ("Answer: (C)", "C"),
    ("**Answer: D**", "D"),
    ("**Answer:** D", "D"),
    ("The correct answer is (a).", "A"),
    ("The correct option is C because it is the largest.", "C"),
    ("The correct choice is: [D]", "D"),
    ("So the answer must be B", "B"),
    ("The final answer is \\boxed{C}.", "C"),
    ("$\\boxed{\\text{A}}$", "A"),
    ("I would choose option B, as it is the closest.", "B"),
    ("I'd go with C.", "C"),
    ("Therefore, B.", "B"),
    ("B is the correct answer.", "B"),
    ("Option D is correct.", "D"),
    ("(A) is right, since the others are too small.", "A"),
    ("C would be the best choice.", "C"),
    ("The best answer would be D", "D"),
    ("My answer is: A", "A"),
    ("ANSWER: A", "A"),
    ("The answer is \u201cB\u201d.", "B"),
    ("The answer is\nB", "B"),
    ("\uff22 is the correct answer", "B"),
    ("<answer>C</answer>", "C"),
]

LEADING = [
    ("B", "B"),
    (" B", "B"),
    ("b", "B"),
    ("B.", "B"),
    ("B\n\nQuestion: what is", "B"),
    ("(C)", "C"),
    ("D) Saturn", "D"),
    ("A. Mars", "A"),
    ("A: Mars is red.", "A"),
    ("C, because of its size.", "C"),
    ("B - Venus", "B"),
]

LATER_OUTWEIGHS = [
    ("At first the answer is A. On reflection, the answer is C.", "C"),
    ("A is correct about colour. But overall the answer is D.", "D"),
    ("Answer: B\nAnswer: C", "C"),
    ("A. Mars is too small.\nB. Venus is too hot.\nC. Jupiter fits.\nAnswer: C", "C"),
]

NEGATED = [
    ("The answer is not B. The answer is C.", "C"),
    ("It is not B, it is D.", "D"),
    ("B is wrong. The correct answer is A.", "A"),
    ("Not A, not C, not D.", "B"),
    ("It is not A, B or C.", "D"),
    ("A is incorrect, B is incorrect, and D is incorrect.", "C"),
    ("We can rule out A. We can eliminate B. D is wrong.", "C"),
    ("not B", None),
    ("The answer is not B.", None),
    ("It isn't C.", None),
    ("Neither A nor B.", None),
    ("B cannot be correct, so the answer is C", "C"),
    ("The answer is A, not B.", "A"),
    ("Rather than B, I choose C.", "C"),
]

BY_TEXT = [
    ("Jupiter", "C"),
    ("The largest planet is Jupiter.", "C"),
    ("jupiter.", "C"),
    ("It is Saturn, not Jupiter.", "D"),
    ("That would be **Venus**.", "B"),
    ("A planet like Mars", "A"),
]

NO_ANSWER = [
    "",
    "   \n",
    "A or B",
    "A and C",
    "Both B and D.",
    "The answer is A or B.",
    "It could be Mars or Venus.",
    "I do not know.",
    "The Earth goes around the Sun.",
    "A planet goes around a star.",
    "I think that is a hard question.",
    "E",
    "The answer is E.",
    "None of the above",
]


@pytest.mark.parametrize(("text", "letter"), STATED + LEADING + LATER_OUTWEIGHS + NEGATED + BY_TEXT)
def test_choice(text: str, letter: str | None) -> None:
    assert extract_choice(text, PLANETS).answer == letter


@pytest.mark.parametrize("text", NO_ANSWER)
def test_no_choice(text: str) -> None:
    assert extract_choice(text, PLANETS).answer is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("The answer is B.", "stated"),
        ("B. Venus", "leading"),
        ("Only (B) has clouds.", "sole"),
        ("Venus", "text"),
        ("Not A, not C, not D.", "elimination"),
        ("Perhaps.", "none"),
    ],
)
def test_names_the_rule(text: str, rule: str) -> None:
    assert extract_choice(text, PLANETS).rule == rule


@pytest.mark.parametrize(
    ("text", "choices", "letter"),
    [
        ("carbon dioxide", ("carbon", "carbon dioxide"), "B"),
        ("It is carbon.", ("carbon", "carbon dioxide"), "A"),
        ("None", ("None", "NA"), "A"),
        ("NA", ("None", "NA"), "B"),
        ("3.5", ("5", "3.5"), "B"),
        ("The result is 42.", ("41", "42"), "B"),
        ("use a (small) knife?", ("use a (small) knife?", "use a spoon"), "A"),
        ("The answer is 4", ("3", "4", "5"), "B"),
        ("A dog", ("cat", "dog"), "B"),
        ("Answer: A dog", ("A dog", "A cat"), "A"),
    ],
)
def test_choices_of_other_kinds(text: str, choices: tuple[str, ...], letter: str) -> None:
    assert extract_choice(text, choices).answer == letter


def test_letters_beyond_the_choices_are_no_answers() -> None:
    assert extract_choice("The answer is C.", ("yes", "no")).answer is None


@pytest.mark.parametrize("count", [1, 27])
def test_number_of_choices(count: int) -> None:
    with pytest.raises(ValueError, match="choices: expected 2 to 26"):
        extract_choice("A", ["x"] * count)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("She makes 9 * 2 = $18 every day.\n#### 18", "18"),
        ("The answer is 18.", "18"),
        ("The answer is $1,234.50.", "1234.5"),
        ("Answer: 70000", "70000"),
        ("Answer: -3", "-3"),
        ("The result is −3 degrees", "-3"),
        ("18.00", "18"),
        ("so she has 12 apples and 3 pears", "3"),
        ("\\boxed{540}", "540"),
        ("The total is 2,125 metres, of which 5 are left.", "2125"),
        ("The answer is 5. No, the answer is 6.", "6"),
        ("That is 25%.", "25"),
        ("0.5", "0.5"),
        ("007", "7"),
        ("1, 2, 3", "3"),
        ("x = 4y + 2 so the answer is: **12**", "12"),
        ("no number here", None),
        ("", None),
    ],
)
def test_number(text: str, number: str | None) -> None:
    assert extract_number(text).answer == number
