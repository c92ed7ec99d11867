"""Find the answer in what a model wrote: the letter of a choice, or a number.

The rules go from the explicit to the implicit, and a later statement outweighs an earlier one, since a text that weighs
its options ends with its conclusion. What is denied ("not B", "B is wrong") is no answer. Where a text names several
answers and decides for none, there is none: a guess would be scored as if the model had answered.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Extraction", "extract_choice", "extract_number"]

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Extraction:
    """An answer found in a text."""

    answer: str | None
    """The letter of a choice, or a number without separators and trailing zeros; None where the text gives none."""
    rule: str
    """What found it: ``stated``, ``leading``, ``sole``, ``text``, ``elimination``, ``number``, or ``none``."""


_NONE = Extraction(None, "none")


class _Ambiguous(Exception):  # noqa: N818 (a finding rather than an error)
    """The text names several answers and decides for none."""


# A letter that stands by itself, with or without brackets.
_MENTION = re.compile(r"(?<![\w'\-])(?P<open>[(\[{]\s*)?(?P<letter>[A-Za-z])(?P<close>\s*[)\]}])?(?![\w'\-])")

_HEDGE = r"(?:\s+(?:therefore|thus|clearly|definitely|probably|most likely|likely|simply|just|indeed|also|obviously))?"

# What stands before a letter that is stated to be the answer: "the answer is", "I would go with option", "\boxed{".
_LEAD = re.compile(
    r"(?:"
    r"\b(?:answer|option|choice|solution|response|conclusion|selection)(?:\s+\w+){0,3}?"
    rf"(?:\s+(?:is|are|was|be|remains)|\s*[:=\-–—→]){_HEDGE}\s*:?"
    r"|\b(?:choose|choosing|chose|select(?:ed|ing)?|pick(?:ed|ing)?|go(?:ing)?\s+(?:with|for)|went\s+with|opt(?:ed)?\s+for|"
    r"vote\s+for|settle\s+on|leaves(?:\s+us\s+with)?|leaving|hence|therefore|thus|so),?"
    rf"|\b(?:it|this|that)(?:'s|\s+(?:is|must\s+be|has\s+to\s+be|would\s+be)){_HEDGE}"
    r"|\\boxed"
    r")\s*(?:the\s+)?(?:option|choice|letter|answer)?\s*[\"'(]*$",
    re.IGNORECASE,
)
# What stands after one: "is correct", "is the best choice".
_TAIL = re.compile(
    r"^[\"']*\s*(?:\([^)]{0,80}\)\s*)?(?:is|was|would\s+be|must\s+be|seems|looks|appears(?:\s+to\s+be)?)"
    rf"{_HEDGE}\s+(?:the\s+)?(?:only\s+|most\s+)?(?:correct|right|best|true|accurate|appropriate|plausible|answer)\b",
    re.IGNORECASE,
)
_FILLER = (
    r"(?:\s+(?:be|is|are|was|the|an?|options?|choices?|answers?|either|just|simply|really|to|think|it|it's|letter|correct|"
    r"right|both|for|with))*"
)
_DENIED_BEFORE = re.compile(
    r"\b(?:not|\w+n't|cannot|never|nor|neither|no|without|except|exclud(?:e|es|ed|ing)|eliminat(?:e|es|ed|ing)|"
    r"rul(?:e|es|ed|ing)\s+out|reject(?:s|ed|ing)?|discard(?:s|ed|ing)?|rather\s+than|instead\s+of|unlike)"
    rf"{_FILLER}[\s:\"'(\[]*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"^[\s\"':]*(?:\([^)]{0,80}\)\s*)?(?:"
    r"(?:is|are|was|would\s+be|seems|looks|can|could|will|does|did)\s+(?:also\s+)?not\b|(?:is|are|was|ca|wo|does|did)n't\b|cannot\b|"
    r"(?:(?:is|are|was|would\s+be|seems|looks)\s+)?(?:(?:also|clearly|definitely|obviously|probably|likely|certainly)\s+)?"
    r"(?:incorrect|wrong|false|ruled\s+out|eliminated|impossible|out\s+of\s+the\s+question)\b)",
    re.IGNORECASE,
)
# "A, B or": the members of a list before a letter, which share what is said of the list.
_MEMBER_BEFORE = re.compile(r"[(\[]?\b[A-Z]\b[)\]]?\s*(?:,\s*(?:or|nor|and)?|\bor|\bnor|\band|/|&)\s*$")
_MEMBER_AFTER = re.compile(r"^\s*(?:or|and|/|&|,\s*(?:or|and)?)\s*(?:option\s+|choice\s+)?[(\[]?([A-Z])\b(?!')")
# Words that follow the letter A, and not the article.
_AFTER_LETTER = re.compile(
    r"^\s+(?:is|was|are|and|or|nor|because|since|as|seems|looks|would|could|can|cannot|must|should|might|may|isn't|but|"
    r"fits|makes)\b"
)


def extract_choice(text: str, choices: Sequence[str]) -> Extraction:
    r"""The choice that a text decides for.

    In this order: a statement ("the answer is B", "B is correct", ``\boxed{B}``), the last one that is not denied; a
    letter that the text begins with; a text that is one of the choices; the only letter that it names; the only choice
    whose wording it has; the only choice that it does not rule out.

    Args:
        text: what the model wrote, after the prompt.
        choices: texts of the choices, two or more; the first has the letter A.

    Raises:
        ValueError: there are fewer than two choices, or more than letters.
    """
    if not 2 <= len(choices) <= len(_ALPHABET):
        raise ValueError(f"choices: expected 2 to {len(_ALPHABET)}, got {len(choices)}")
    letters = _ALPHABET[: len(choices)]
    plain = _plain(text)
    mentions = _mentions(plain, letters)
    try:
        if found := _stated(mentions):
            return Extraction(found, "stated")
        if found := _whole(plain, choices):
            return Extraction(found, "text")
        if found := _leading(plain, mentions):
            return Extraction(found, "leading")
        if found := _sole(mentions):
            return Extraction(found, "sole")
        if found := _by_text(plain, choices):
            return Extraction(found, "text")
    except _Ambiguous:
        return _NONE
    if found := _by_elimination(mentions, letters):
        return Extraction(found, "elimination")
    return _NONE


def _plain(text: str) -> str:
    """Without mark-up and typographic variants."""
    text = unicodedata.normalize("NFKC", text).translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"</?(?:b|i|em|strong|answer)>", "", text, flags=re.IGNORECASE)
    return re.sub(r"\*+|(?<!\w)_+|_+(?!\w)|`+|\$", "", text)


@dataclass(frozen=True)
class _Mention:
    """A letter that stands for a choice."""

    letter: str
    start: int
    stated: bool
    denied: bool
    alternative: bool
    """Whether another letter stands beside it, as in "A or B"."""


def _mentions(text: str, letters: str) -> list[_Mention]:
    found = []
    for match in _MENTION.finditer(text):
        letter = match["letter"].upper()
        if letter not in letters:
            continue
        # A bracket that closes what was opened earlier is none of the letter's: "(see C)".
        start = match.start() if match["close"] and match["open"] else match.start("letter")
        before, after = text[max(0, start - 80) : start], text[match.end() :]
        boxed = before.endswith("\\boxed")
        bracketed = bool(match["open"] and match["close"]) or boxed
        lead = bool(_LEAD.search(before))
        if not bracketed and not _is_letter(match, lead, after):
            continue
        clause = re.split(r"[.!?;\n](?=\s|$)", before)[-1]
        denied = _denied_before(clause) or bool(_DENIED_AFTER.match(after))
        other = _MEMBER_AFTER.match(after)
        found.append(
            _Mention(
                letter=letter,
                start=match.start("letter"),
                stated=lead or bool(_TAIL.match(after)),
                denied=denied,
                alternative=bool(other and other[1] in letters and other[1] != letter),
            )
        )
    return found


def _is_letter(match: re.Match[str], lead: bool, after: str) -> bool:
    """Whether a bare letter names a choice, rather than being an article, a pronoun or the like."""
    ends = re.match(r"[\"']?\s*[.!]?\s*(?:\n|$)", after) is not None
    if match["letter"].islower():
        return lead and (ends or bool(match["close"]))
    if match["letter"] in "AI" and re.match(r"\s+[^\W\d_]", after):
        return bool(_AFTER_LETTER.match(after)) and match["letter"] == "A"
    return True


def _denied_before(clause: str) -> bool:
    while not _DENIED_BEFORE.search(clause):  # "not A, B or C" denies all three
        shorter = _MEMBER_BEFORE.sub("", clause)
        if shorter == clause:
            return False
        clause = shorter
    return True


def _stated(mentions: Sequence[_Mention]) -> str | None:
    stated = [mention for mention in mentions if mention.stated and not mention.denied]
    if not stated:
        return None
    if stated[-1].alternative:
        raise _Ambiguous
    return stated[-1].letter


def _whole(text: str, choices: Sequence[str]) -> str | None:
    """The choice that the text's first line is, word for word, after a lead if it has one."""
    lines = text.strip().splitlines()
    line = (
        re.sub(r"^(?:the\s+)?(?:correct\s+)?answer\s*(?:is|:)\s*", "", lines[0], flags=re.IGNORECASE) if lines else ""
    )
    same = [index for index, choice in enumerate(choices) if _words(choice) and _words(choice) == _words(line)]
    return _ALPHABET[same[0]] if len(same) == 1 else None


def _leading(text: str, mentions: Sequence[_Mention]) -> str | None:
    match = re.match(r"\s*[(\[\"']*\s*([A-Za-z])\s*(?:[)\].:,\"']|\n|$|\s[-–—(])", text)
    if match is None:
        return None
    first = next((mention for mention in mentions if mention.start == match.start(1)), None)
    if first is None:  # a small letter is none elsewhere, but the whole of an answer
        alone = re.fullmatch(r"[(\[\"']*\s*([a-z])\s*[)\].:\"']*", text.strip().split("\n")[0])
        return match[1].upper() if alone else None
    if first.alternative:
        raise _Ambiguous
    return None if first.denied else first.letter


def _sole(mentions: Sequence[_Mention]) -> str | None:
    affirmed = {mention.letter for mention in mentions if not mention.denied}
    if len(affirmed) > 1:
        raise _Ambiguous
    return next(iter(affirmed), None)


def _by_text(text: str, choices: Sequence[str]) -> str | None:
    """The choice whose wording the text has. One within another's counts only where the other does not stand."""
    words = _words(text)
    left = words
    affirmed: set[str] = set()
    wordings = [_words(choice) for choice in choices]
    for index in sorted(range(len(choices)), key=lambda index: -len(wordings[index])):
        if not wordings[index]:
            continue
        pattern = re.compile(rf"(?<![\w.]){re.escape(wordings[index])}(?!\w)")
        for match in pattern.finditer(left):
            clause = re.split(r"[.!?;](?=\s|$)", words[max(0, match.start() - 80) : match.start()])[-1]
            if not (_DENIED_BEFORE.search(clause) or _DENIED_AFTER.match(words[match.end() :])):
                affirmed.add(_ALPHABET[index])
        left = pattern.sub(lambda match: "\0" * len(match[0]), left)
    if len(affirmed) > 1:
        raise _Ambiguous
    return next(iter(affirmed), None)


def _words(text: str) -> str:
    return re.sub(r"\s+", " ", _plain(text)).strip().strip(".").casefold()


def _by_elimination(mentions: Sequence[_Mention], letters: str) -> str | None:
    denied = {mention.letter for mention in mentions if mention.denied}
    left = [letter for letter in letters if letter not in denied]
    return left[0] if len(left) == 1 and len(letters) > 2 else None


_NUMBER = r"(?<![\w.])(?:[-−+]\s?)?(?:[€£]\s?)?(?:\d{1,3}(?:[,\u202f]\d{3})+|\d+)(?:\.\d+)?(?!\d)"


def extract_number(text: str) -> Extraction:
    """The number that a text gives as its answer: after ``####``, else in its last statement, else its last number.

    Signs, currencies, percent signs and separators of thousands are understood; ``18.00`` is ``18``.
    """
    plain = _plain(text)
    for lead in (
        r"####\s*",
        r"\\boxed\s*\{\s*",
        r"\b(?:answer|result|total)\b[^\d\n]{0,40}?(?:\bis|:|=)[^\d\n−-]{0,25}",
    ):
        if found := list(re.finditer(rf"{lead}(?P<number>{_NUMBER})", plain, re.IGNORECASE)):
            return Extraction(_normal(found[-1]["number"]), "stated")
    if found := list(re.finditer(_NUMBER, plain)):
        return Extraction(_normal(found[-1][0]), "number")
    return _NONE


def _normal(number: str) -> str:
    digits = re.sub(r"[,\s€£+\u202f]", "", number).replace("−", "-")
    sign = "-" if digits.startswith("-") else ""
    whole, _, fraction = digits.lstrip("-").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    value = f"{whole}.{fraction}" if fraction else whole
    return value if value == "0" else sign + value
