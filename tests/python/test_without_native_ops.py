"""Devices without native ops are served by `attnrb.ops.dense`: ``ATTNRB_NATIVE=0`` hides the kernels of the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from attnrb import Edit, functional
from attnrb.ops import dense
from own_process import passed
from process_memory import printed
from torch import Tensor

# What nobody with native ops ever runs: patched models without them.
_PROGRAM = """
import warnings

import attnrb
import torch
from tiny_models import tiny, tokens

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in ("llama", "gpt2", "qwen3", "gemma3_text", "mistral", "gpt_oss", "cohere2", "phi", "olmo2", "gpt_neox"):
        model, ids = tiny(name), tokens(2, 24)
        with torch.no_grad():
            plain = model(ids).logits
            with attnrb.patch(model, alpha=0.0):
                assert (model(ids).logits - plain).abs().max() < 1e-4, name
            with attnrb.patch(model, alpha=4.0, threshold=0.02) as patched:
                strong = model(ids).logits
        assert patched.stats.rows and (strong - plain).abs().max() > 1e-4, name
told = [str(each.message) for each in caught if "no native ops" in str(each.message)]
assert len(told) == 1 and "ATTNRB_NATIVE=0" in told[0], told
print("served")
"""

_MEMORY = """
import torch
from attnrb import functional

def run(keys):
    query, key = torch.randn(1, 2, keys, 256, requires_grad=True), torch.randn(1, 1, keys, 256)
    functional.attention(query, key, key, emit=0.01).output.sum().backward()
    functional.received_attention(query.detach(), key)
    return peak()

run(2048)  # blocks of 4 million weights come in here
print(*map(run, (2048, 4096, 8192)))
"""

_OP_TESTS = ("accuracy_attention", "accuracy_weights", "accuracy_not_finite", "attention_accuracy", "training_accuracy")
# One case in so many, prime to the numbers of dtypes, rules and kinds.
_SAMPLE = {"ATTNRB_TEST_SAMPLE": "31", "ATTNRB_TEST_GRADIENT_SAMPLE": "61"}


@pytest.fixture
def without_native_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """For processes that the test starts."""
    monkeypatch.setenv("ATTNRB_NATIVE", "0")
    # Freed blocks go back at once, so that the peak is that of what is held.
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")


@pytest.mark.slow
@pytest.mark.usefixtures("without_native_ops")
def test_models_without_native_ops() -> None:
    pytest.importorskip("transformers")
    assert printed(_PROGRAM).strip().endswith("served")


@pytest.mark.slow
@pytest.mark.usefixtures("without_native_ops")
def test_memory_grows_as_the_text_does() -> None:
    """Forward with outliers, backward, and received attention. With a matrix of all weights the exponent would be 2."""
    first, second, third = map(int, printed(_MEMORY).split())
    assert second > first
    assert math.log2((third - second) / (second - first)) <= 1.1


@pytest.mark.slow
@pytest.mark.usefixtures("without_native_ops")
@pytest.mark.parametrize("stem", _OP_TESTS)
def test_the_op_table_without_native_ops(stem: str) -> None:
    passed([stem], _SAMPLE)


@pytest.mark.parametrize("rule", ["none", "row", "rest"])
def test_blocks_that_are_computed_again_have_the_same_gradients(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(2, heads, 9, 8, generator=generator, dtype=torch.float64).requires_grad_()
            for heads in (4, 2, 2)
        )
        gain = torch.tensor([0.5, -0.5, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
        bias = torch.randn(2, 1, 9, generator=generator, dtype=torch.float64).requires_grad_()
        outliers = functional.attention(query.detach(), key.detach(), value.detach(), emit=0.1).outliers
        edit = Edit(outliers, gain, rule, key_bias=bias)
        attended = functional.attention(query, key, value, edit=edit)
        received = functional.received_attention(query, key, key_bias=bias)
        loss = attended.output.square().sum() + attended.lse.sum() + received.square().sum()
        return torch.autograd.grad(loss, (query, key, value, gain, bias))

    whole = gradients()
    monkeypatch.setattr(dense, "_BLOCK", 1)  # a row at a time
    for each, expected in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
