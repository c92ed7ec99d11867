"""What costs speed or memory is told in one line to the logger `attnrb`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import attnrb
import pytest
import torch
from attnrb import decisions, functional
from attnrb.ops import _native, dense
from conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "logging.md"


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was told since the test began, or since the last question."""
    decisions.forget()
    caplog.set_level(logging.INFO, "attnrb")

    def lines() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.name == "attnrb"]
        assert all(record.levelno == logging.INFO for record in caplog.records if record.name == "attnrb")
        caplog.clear()
        return found

    return lines


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 1, 2, 5, 8, dtype=dtype).unbind()


def test_a_native_call_tells_nothing(told: Callable[[], list[str]]) -> None:
    functional.attention(*operands())
    assert told() == []


def test_the_dense_path_says_why_it_is_taken_and_says_it_once(told: Callable[[], list[str]]) -> None:
    functional.attention(*operands(torch.float64))
    functional.attention(*operands(torch.float64))
    lines = told()
    assert len(lines) == 1
    assert lines[0].startswith("dense: plain PyTorch")
    assert lines[0].endswith("because operands are float64")
    query, key, value = operands()
    torch.func.jvp(lambda x: functional.attention(x, key, value).output, (query,), (query,))
    assert [line.rpartition(", because ")[2] for line in told()] == ["the call is under a transform of torch.func"]
    decisions.forget()
    functional.attention(*operands(torch.float64))
    assert len(told()) == 1, "after forget() it is told again"


def test_a_recorded_dense_call_of_several_blocks(
    told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = operands(torch.float64)
    functional.attention(query.requires_grad_(), key, value)
    assert [line.partition(":")[0] for line in told()] == ["dense"]
    monkeypatch.setattr(dense, "_BLOCK", 1)
    functional.attention(query, key, value)
    assert [line.partition(":")[0] for line in told()][-1] == "dense_gradient"


def test_casts_and_weights(told: Callable[[], list[str]]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        functional.attention(*operands())
        functional.attention(*operands(torch.bfloat16))
    (line,) = told()
    assert line.startswith("cast: ")
    assert line.endswith("torch.float32 becomes torch.bfloat16")
    functional.attention_weights(*operands()[:2])
    assert [line.partition(":")[0] for line in told()] == ["weights"]


def test_a_patch_tells_what_it_keeps(told: Callable[[], list[str]]) -> None:
    pytest.importorskip("transformers")
    from tiny_models import tiny, tokens

    model, ids = tiny("llama"), tokens(1, 9)
    with torch.no_grad(), attnrb.patch(model, attnrb.Rebalance(source_layer=1)):
        model(ids)
        model(ids)
    assert [line.rpartition(", because ")[2] for line in told()] == ["Rebalance edits by those of layers [1]"]
    with attnrb.patch(model, attnrb.Emphasis()):
        model(ids)
    assert told() == []


def test_a_share_of_attention_takes_several_passes(told: Callable[[], list[str]]) -> None:
    pytest.importorskip("transformers")
    from tiny_models import tiny, tokens

    model = tiny("llama")
    spans = attnrb.Spans([[attnrb.Span(2, 5)]])
    with torch.no_grad(), attnrb.patch(model, attnrb.Emphasis(share=0.3)) as patched, patched.spans(spans):
        model(tokens(1, 9))
    assert [line.partition(":")[0] for line in told()] == ["parts"]


def test_nothing_is_told_from_within_a_graph(told: Callable[[], list[str]]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: functional.attention(*x).output, backend="eager", fullgraph=True)
    compiled(*operands(torch.float64))
    assert told() == []


def test_a_program_that_asks_for_nothing_sees_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    decisions.forget()
    functional.attention(*operands(torch.float64))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_every_decision_has_its_place_and_its_line_in_the_documentation() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == list(decisions.DECISIONS)
    sources = "".join(path.read_text("utf-8") for path in (REPOSITORY / "python").rglob("*.py"))
    used = set(re.findall(r'\btell\(\s*"(\w+)"', sources))
    assert used == set(decisions.DECISIONS)


def test_library_kernels_are_those_that_torch_may_use() -> None:
    before = torch.backends.cuda.flash_sdp_enabled()
    try:
        torch.backends.cuda.enable_flash_sdp(False)
        assert "flash" not in _native.library_kernels()
        torch.backends.cuda.enable_flash_sdp(True)
        assert "flash" in _native.library_kernels()
    finally:
        torch.backends.cuda.enable_flash_sdp(before)
