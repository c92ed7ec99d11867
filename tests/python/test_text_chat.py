"""Marked chats: the tokens are those of the plain messages, and spans survive the template or an error says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attnrb.text import MarkupError, SpanError, mark
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from text_tokenizers import KINDS, SlowTokenizer, texts

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ CONTENT }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
AS_IS = CHATML.replace("CONTENT", "m['content']")
STRIPPED = CHATML.replace("CONTENT", "m['content'] | trim")
PARTS = CHATML.replace(
    "{{ CONTENT }}",
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] | trim if part['type'] == 'text' else '<image>' }}"
    "{% endfor %}{% endif %}",
)
CHAT = [
    {"role": "system", "content": "Be ((brief:0.5))."},
    {"role": "user", "content": " What is ((this))? "},
    {"role": "assistant", "content": "A ((cat ((sat:2)):3))."},
    {"role": "user", "content": "user: ((this)) or that ((or)) this"},
]
PLAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is this? "},
    {"role": "assistant", "content": "A cat sat."},
    {"role": "user", "content": "user: this or that or this"},
]


def with_template(name: str, template: str) -> Any:
    tokenizer = KINDS[name]()
    tokenizer.chat_template = template
    return tokenizer


def texts_of(marked: Any, row: int = 0) -> list[str]:
    ids = marked.inputs["input_ids"][row]
    return [marked.tokenizer.decode(ids[span.start : span.end]).strip() for span in marked.spans[row]]


@pytest.mark.parametrize("template", [AS_IS, STRIPPED, PARTS], ids=["as it is", "stripped", "parts"])
@pytest.mark.parametrize("name", KINDS)
def test_spans_survive_the_template(name: str, template: str) -> None:
    tokenizer = with_template(name, template)
    marked = mark(tokenizer, CHAT)
    expected = tokenizer.apply_chat_template(PLAIN, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert set(marked.inputs) == set(expected)
    assert torch.equal(marked.inputs["input_ids"], expected["input_ids"])
    assert marked.texts[0] == tokenizer.apply_chat_template(PLAIN, add_generation_prompt=True, tokenize=False)
    assert [span.strength for span in marked.spans[0]] == [0.5, None, 3.0, 2.0, None, None]
    assert [span.start for span in marked.spans[0]] == sorted(span.start for span in marked.spans[0])
    # Each where its own message has it, and not where the same word stands elsewhere.
    places = [marked.texts[0].index("brief"), marked.texts[0].index("this?"), *[marked.texts[0].index("cat sat")] * 2]
    places[3] += len("cat ")
    last = marked.texts[0].index("user: this") + len("user: ")
    places += [last, last + len("this or that ")]
    ends = [place + length for place, length in zip(places, [5, 4, 7, 3, 4, 2], strict=True)]
    encoding = marked.inputs.encodings[0]
    for span, place, end in zip(marked.spans[0], places, ends, strict=True):
        inside = encoding.offsets[span.start : span.end]
        assert inside[0][0] <= place < inside[0][1] and inside[-1][0] < end <= inside[-1][1]


def test_the_answer_is_asked_for_unless_the_assistant_has_the_last_word() -> None:
    tokenizer = with_template("byte-level", AS_IS)
    asked, answered = CHAT[:2], CHAT[:3]
    assert mark(tokenizer, asked).texts[0].endswith("<|assistant|>")
    assert mark(tokenizer, answered).texts[0].endswith("A cat sat.</s>\n")
    assert mark(tokenizer, asked, add_generation_prompt=False).texts[0].endswith("this? </s>\n")
    continued = mark(tokenizer, answered, continue_final_message=True)
    assert continued.texts[0].endswith("A cat sat.")
    assert texts_of(continued) == ["brief", "this", "cat sat", "sat"]
    begun = mark(tokenizer, [{"role": "user", "content": "x ((y))"}], continue_final_message=True)
    assert begun.texts[0].endswith("x y") and texts_of(begun) == ["y"]


def test_several_conversations_are_padded() -> None:
    tokenizer = with_template("Llama", AS_IS)
    marked = mark(tokenizer, [CHAT, CHAT[:2]])
    expected = tokenizer.apply_chat_template(
        [PLAIN, PLAIN[:2]], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    assert torch.equal(marked.inputs["input_ids"], expected["input_ids"])
    assert torch.equal(marked.inputs["attention_mask"], expected["attention_mask"])
    assert texts_of(marked, 1) == ["brief", "this"]
    padding = int((expected["attention_mask"][1] == 0).sum())
    assert marked.spans[1] == mark(tokenizer, CHAT[:2]).spans.shift(padding)[0]
    assert len(mark(tokenizer, [CHAT]).spans) == 1


def test_parts_of_a_content() -> None:
    tokenizer = with_template("byte-level", PARTS)
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look at ((this:2)) "},
                {"type": "image"},
                {"type": "text", "text": " or ((that))"},
            ],
        }
    ]
    marked = mark(tokenizer, chat)
    assert marked.texts[0].startswith("<|user|>Look at this<image>or that</s>")
    assert texts_of(marked) == ["this", "that"]
    with pytest.raises(MarkupError, match=r"messages\[0\].content\[2\].text: '\(\(' opens"):
        mark(tokenizer, [{"role": "user", "content": [*chat[0]["content"][:2], {"type": "text", "text": "((a"}]}])


def test_messages_without_text_and_other_fields_are_left_alone() -> None:
    template = AS_IS.replace(
        "{{ m['content'] }}", "{{ m.get('content', '') }}{{ m.get('name', '') }}{{ tools }}{{ mood }}"
    )
    tokenizer = with_template("byte-level", template)
    chat = [{"role": "user", "content": "((a))", "name": "((b))"}, {"role": "tool", "content": None}]
    before = [dict(message) for message in chat]
    marked = mark(tokenizer, chat, mood="((c))", tools=[{"type": "function"}])
    assert chat == before
    assert marked.texts[0].startswith("<|user|>a((b))[{'type': 'function'}]((c))")
    assert texts_of(marked) == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("'x'", "drops the marked text 'this'"),
        ("m['content'] | upper", "rewrites the marked text 'this'"),
        ("m['content'].replace('th', 'd')", "rewrites the marked text 'this'"),
        ("m['content'][:11]", "rewrites the marked text 'this'"),
        ("m['content'] ~ (m['content'] | length)", "writes another text when the messages carry marks"),
    ],
    ids=["dropped", "upper case", "replaced", "cut", "counted"],
)
def test_what_a_template_does_to_the_text_is_said(content: str, message: str) -> None:
    tokenizer = with_template("byte-level", CHATML.replace("CONTENT", content))
    chat = [{"role": "user", "content": "plain"}, {"role": "user", "content": "What is ((this))?"}]
    with pytest.raises(SpanError, match=message) as error:
        mark(tokenizer, chat)
    assert str(error.value).startswith("messages")
    with pytest.raises(SpanError, match=r"conversations\[1\]"):
        mark(tokenizer, [chat[:1], chat])
    assert mark(tokenizer, chat[:1]).spans.rows == ((),)


def test_what_a_template_does_to_other_messages_does_not_matter() -> None:
    template = CHATML.replace("{{ CONTENT }}", "{{ m['content'] if loop.last else m['content'] | upper }}")
    marked = mark(
        with_template("byte-level", template), [{"role": "user", "content": "a"}, {"role": "user", "content": "((b))"}]
    )
    assert texts_of(marked) == ["b"]


def test_a_text_that_a_template_repeats_is_marked_in_each_place() -> None:
    tokenizer = with_template("byte-level", CHATML.replace("{{ CONTENT }}", "{{ m['content'] }} / {{ m['content'] }}"))
    marked = mark(tokenizer, [{"role": "user", "content": "x ((y:2))"}])
    assert marked.texts[0].startswith("<|user|>x y / x y</s>")
    assert texts_of(marked) == ["y", "y"]
    assert marked.spans.log_strengths(1.0).exp().max().item() == pytest.approx(2.0)


def test_json_in_a_template_keeps_what_it_does_not_escape() -> None:
    tokenizer = with_template("byte-level", CHATML.replace("CONTENT", "m['content'] | tojson"))
    assert texts_of(mark(tokenizer, [{"role": "user", "content": 'say "so" to ((数 this))'}])) == ["数 this"]
    with pytest.raises(SpanError, match="rewrites the marked text"):
        mark(tokenizer, [{"role": "user", "content": 'say (("so"))'}])


@settings(max_examples=60)
@given(st.lists(st.lists(st.tuples(texts(max_size=5), st.booleans()), min_size=1, max_size=3), min_size=1, max_size=3))
def test_any_chat_equals_the_text_that_its_template_writes(messages: list[list[tuple[str, bool]]]) -> None:
    """Rendered with brackets in the place of spans, a template that adds but does not change gives the truth."""
    tokenizer = with_template("byte-level", AS_IS)
    chat, plain = [], []
    for parts in messages:
        assume(all(text.strip() for text, is_marked in parts if is_marked))
        chat.append({"role": "user", "content": "".join(f"[[{t}]]" if is_marked else t for t, is_marked in parts)})
        plain.append({"role": "user", "content": "".join(text for text, _ in parts)})
    marked = mark(tokenizer, chat, open="[[", close="]]")
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    as_text = mark(tokenizer, rendered, open="[[", close="]]", add_special_tokens=False)
    assert marked.texts == as_text.texts
    assert marked.spans == as_text.spans
    assert torch.equal(marked.inputs["input_ids"], as_text.inputs["input_ids"])
    assert marked.texts[0] == tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)


@settings(max_examples=40)
@given(texts(min_size=1, max_size=8), st.sampled_from(["\U000f0000", "\U000f0001\U000f0002", "x"]))
def test_private_characters_of_the_user_are_text(inside: str, private: str) -> None:
    assume(inside.strip())
    tokenizer = with_template("byte-level", STRIPPED)
    marked = mark(tokenizer, [{"role": "user", "content": f" {private}[[{inside}]]{private} "}], open="[[", close="]]")
    assert marked.texts[0].startswith(f"<|user|>{private}{inside}{private}</s>")
    as_text = mark(tokenizer, f"<|user|>{private}[[{inside}]]{private}</s>", open="[[", close="]]")
    assert marked.spans == as_text.spans


def test_a_tokenizer_without_offsets_takes_chats() -> None:
    tokenizer = SlowTokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    marked = mark(tokenizer, [{"role": "user", "content": "a ((bcd))"}])
    # "us er :  a  bc d\n", the space before b with a
    assert [(span.start, span.end) for span in marked.spans[0]] == [(4, 6)]
    assert marked.tokenizer.decode(marked.inputs["input_ids"][0, 4:6]) == "bcd\n"


@pytest.mark.parametrize(
    ("chat", "options", "error", "message"),
    [
        ([{"role": "user", "content": "((a"}], {}, MarkupError, r"messages\[0\].content: '\(\(' opens a span"),
        ([[{"role": "user", "content": "a"}], "b"], {}, TypeError, r"conversations\[1\]: expected a list of messages"),
        ([{"role": "user", "content": "a"}, "b"], {}, TypeError, r"messages\[1\]: expected a dictionary"),
        ([{"role": "user", "content": "a"}], {"tokenize": False}, TypeError, "tokenize: not an option here"),
        (
            [{"role": "user", "content": "a"}],
            {"sanitize_control_tokens": True},
            TypeError,
            "sanitize_control_tokens: not an option here",
        ),
        (
            [{"role": "user", "content": "a"}],
            {"tokenizer_kwargs": {"stride": 1}},
            TypeError,
            "stride: not an option here",
        ),
    ],
)
def test_bad_chats_are_refused(chat: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mark(with_template("byte-level", AS_IS), chat, **options)


def test_a_tokenizer_without_a_template_says_so() -> None:
    with pytest.raises(ValueError, match="chat_template is not set"):
        mark(KINDS["byte-level"](), [{"role": "user", "content": "a"}])
