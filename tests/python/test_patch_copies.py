"""Copies of a patched model, made by any means, are not patched; the model itself stays so."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from test_patch_models import CONFIG
from tiny_models import tiny, tokens

pytestmark = pytest.mark.oldest


def through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # what this test itself wrote


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch],
    ids=["deep", "pickle", "torch"],
)
def test_a_copy_is_clean(name: str, duplicate: Callable[[Any], Any]) -> None:
    model, ids = tiny(name), tokens(2, 16)
    implementation = model.config._attn_implementation
    with torch.no_grad():
        plain = model(ids).logits
        with attnrb.patch(model, CONFIG) as patched:
            rebalanced = model(ids).logits
            twin = duplicate(model)
            for module in twin.modules():
                if "config" in vars(module):
                    assert module.config._attn_implementation == implementation
            assert torch.equal(twin(ids).logits, plain)
            assert torch.equal(twin.generate(ids[:, :4], max_new_tokens=3, do_sample=False)[:, :4], ids[:, :4])
            with attnrb.patch(twin, CONFIG):
                assert torch.equal(twin(ids).logits, rebalanced)
            assert patched.active
            assert torch.equal(model(ids).logits, rebalanced)
        assert torch.equal(model(ids).logits, plain)


def test_a_patch_is_not_copied() -> None:
    with attnrb.patch(tiny("llama")) as patched:
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="belongs to one model and cannot be copied"):
                duplicate(patched)
