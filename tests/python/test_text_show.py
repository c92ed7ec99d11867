"""A marked batch shown as text and as HTML."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from attnrb.text import Marked, mark
from text_tokenizers import KINDS

TOKENIZERS = {name: make() for name, make in KINDS.items()}


def shown(marked: Marked) -> str:
    stream = io.StringIO()
    marked.show(stream)
    return stream.getvalue()


def test_marked_tokens_stand_out(capsys: pytest.CaptureFixture[str]) -> None:
    marked = mark(TOKENIZERS["Llama"], ["((the cat ((sat:2)):4)) on ((the)) mat", "the cat"])
    marked.show()
    assert capsys.readouterr().out == (
        "row 0 (7 tokens, 4 marked)\n<s>⟦ the· cat⟧×4⟦ sat⟧×4×2 on⟦ the⟧ mat\n"
        "row 1 (3 tokens, 0 marked, 4 of padding before)\n<s> the cat\n"
    )
    assert repr(marked) == (
        "Marked(\n"
        "  row 0 (7 tokens, 4 marked): <s>⟦ the· cat⟧×4⟦ sat⟧×4×2 on⟦ the⟧ mat\n"
        "  row 1 (3 tokens, 0 marked, 4 of padding before): <s> the cat\n"
        ")"
    )


def test_spans_that_share_tokens_show_the_policy() -> None:
    assert "⟦ cat⟧×2×policy's" in shown(mark(TOKENIZERS["Llama"], "((the ((cat)):2))"))
    assert "⟦ cat⟧×policy's×policy's" in shown(mark(TOKENIZERS["Llama"], "((the ((cat))))"))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_shown_is_harmless(name: str) -> None:
    marked = mark(TOKENIZERS[name], "<script>&\x1b[2J ((<b>\x1b[31m\u202eevil</b>)) </mark><img src=x>")
    for text in (shown(marked), repr(marked)):
        assert not any(character in text for character in "\x1b\u202e")
    page = marked._repr_html_()
    inside = page
    for tag in ("<mark ", "</mark>", "<p>", "</p>", "<small>", "</small>", "<br>", "<div style=", "</div>"):
        inside = inside.replace(tag, "")
    assert not any(tag in inside for tag in ("<b>", "<script", "<img", "\x1b", "\u202e"))
    assert page.count("<mark ") == page.count("</mark>") == 1


def test_long_batches_are_shown_in_part() -> None:
    tokenizer = TOKENIZERS["Llama"]
    marked = mark(tokenizer, ["the cat " * 100 + "((sat)) " + "on the mat " * 100] * 40)
    text = repr(marked)
    assert len(text) < 1_000 and "⟦ sat⟧" in text and "…" in text and "and 36 rows more" in text
    assert len(marked._repr_html_()) < 200_000
    assert "and 24 rows more" in marked._repr_html_()
    unmarked = repr(mark(tokenizer, "the cat " * 500))
    assert len(unmarked) < 200 and "<s> the cat" in unmarked
    # Every row is printed whole where that is asked for.
    assert shown(marked).count("⟦ sat⟧") == 40 and "…" not in shown(marked)


def test_characters_of_several_tokens_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert "a⟦😀⟧b" in shown(mark(TOKENIZERS["byte-level"], "a((😀))b"))
    assert "a⟦😀⟧b" in shown(mark(TOKENIZERS["Gemma"], "a((😀))b"))


def test_lists_and_tensors_alike() -> None:
    tokenizer = TOKENIZERS["Llama"]
    tensors, lists = mark(tokenizer, "((the)) cat"), mark(tokenizer, "((the)) cat", return_tensors=None)
    assert shown(tensors) == shown(lists) and repr(tensors) == repr(lists)


def test_moving_to_a_device() -> None:
    marked: Any = mark(TOKENIZERS["Llama"], "((the)) cat")
    moved = marked.to("meta")
    assert {value.device.type for value in moved.inputs.values()} == {"meta"}
    assert moved.spans == marked.spans and set(moved.inputs) == set(marked.inputs)
    assert torch.equal(marked.to("cpu").inputs["input_ids"], marked.inputs["input_ids"])
