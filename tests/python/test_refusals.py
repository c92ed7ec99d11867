"""Refusals of native ops by type, and caches by name: what newer versions of torch and transformers changed.

The versions at hand may be older, so what is newer is imitated here; `make matrix` has the real ones.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attnrb.ops import refusals


class OtherError(RuntimeError):
    """Such as torch raises for memory of a device."""


@pytest.mark.parametrize(
    ("error", "type_"),
    [
        (RuntimeError("query: expected 4 dimensions [B, H, M, D], got 3"), ValueError),
        (RuntimeError("ATTNRB_CPU: expected one of avx2, got 'mmx'"), ValueError),
        (RuntimeError("attnrb: cudaMalloc failed: out of memory"), RuntimeError),
        (RuntimeError("Expected all tensors to be on the same device"), RuntimeError),
        (OtherError("query: expected something"), OtherError),
        (MemoryError("std::bad_alloc"), MemoryError),
    ],
)
def test_a_refusal_whose_type_was_lost_is_a_value_error(
    error: Exception, type_: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def op(*_: Any) -> None:
        raise error

    monkeypatch.setattr(refusals, "REFUSAL", RuntimeError)
    with pytest.raises(type_) as raised:
        refusals.native_op(op)(1)
    assert type(raised.value) is type_
    assert str(raised.value) == str(error)


def test_an_op_that_says_it_right_is_called_without_a_detour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "REFUSAL", ValueError)
    assert refusals.native_op(len) is len
    monkeypatch.setattr(refusals, "REFUSAL", RuntimeError)
    assert refusals.native_op(len)("abc") == 3


class Newer(torch.nn.Module):
    """Names its cache as transformers does from 5.24 on."""

    def forward(self, input_ids: Any, cache: Any = None, **keywords: Any) -> Any:
        return cache


class Older(torch.nn.Module):
    """Names it as transformers did before."""

    def forward(self, input_ids: Any, past_key_values: Any = None) -> Any:
        return past_key_values


def test_a_cache_is_found_under_either_name() -> None:
    pytest.importorskip("transformers")
    from attnrb.hosts.transformers.caches import cache_of, with_cache
    from transformers.modeling_outputs import BaseModelOutputWithPast

    held = SimpleNamespace()
    for given in (
        {"cache": held},
        {"past_key_values": held, "use_cache": True},
        {"cache": None, "past_key_values": held},
    ):
        assert cache_of(given) is held
        assert cache_of(SimpleNamespace(**given)) is held
    assert cache_of({"use_cache": True}) is None
    assert cache_of(SimpleNamespace(logits=1)) is None
    for model in (Newer(), Older()):
        assert model(0, **with_cache(model, held)) is held
    output = BaseModelOutputWithPast(**with_cache_of_output(held))
    assert cache_of(output) is held


def with_cache_of_output(held: Any) -> dict[str, Any]:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    names = BaseModelOutputWithPast.__dataclass_fields__
    return {"cache" if "cache" in names else "past_key_values": held}
