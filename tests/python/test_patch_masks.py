"""Masks: what is said without a matrix, what falls back to one, and masks that attnrb did not make."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from attnrb.ops.visibility import Visibility
from dense_oracle import DenseOracle, linear_gains
from test_patch_models import CONFIG, assert_close, oracle, run
from tiny_models import LAYERS, WINDOW, tiny, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.oldest


class Recorder(TorchDispatchMode):
    """What the native op of each layer was told that its queries may see, by the names of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Visibility] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {**(kwargs or {})}
        if function.namespace == "attnrb" and "query_offset" in {each.name for each in function._schema.arguments}:
            defaults = {each.name: each.default_value for each in function._schema.arguments}
            named = dict(zip(defaults, args, strict=False))
            told = {**defaults, **named, **given}
            names = ("causal", "query_offset", "key_offset", "key_start", "key_end", "mask")
            limits = {name: told.get(name) or None for name in ("window", "chunk")}
            self.calls.append(Visibility(**{name: told[name] for name in names}, **limits))
        return function(*args, **given)


@pytest.fixture
def seen() -> Iterator[list[Visibility]]:
    """What the native op of each layer was told that its queries may see."""
    with Recorder() as recorder:
        yield recorder.calls


def padding(*rows: str) -> Tensor:
    return torch.tensor([[int(slot) for slot in row] for row in rows])


def bounds(visibility: Visibility) -> tuple[list[int] | None, list[int] | None]:
    start, end = visibility.key_start, visibility.key_end
    return None if start is None else start.tolist(), None if end is None else end.tolist()


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, (None, None)),
        (padding("11111111", "11111111"), (None, None)),
        (padding("11111111", "00011111"), ([0, 3], [8, 8])),
        (padding("11111111", "11110000"), ([0, 0], [8, 4])),
        (padding("00111100", "00000001"), ([2, 7], [6, 8])),
        (padding("11111111", "00000000"), ([0, 0], [8, 0])),
    ],
    ids=["no mask", "no padding", "left", "right", "both", "an empty row"],
)
def test_padding_is_two_numbers_a_row(mask: Tensor | None, expected: Any, seen: list[Visibility]) -> None:
    model, ids = tiny("llama"), tokens(2, 8)
    logits = run(model, ids, attention_mask=mask)
    assert len(seen) == LAYERS
    for visibility in seen:
        assert visibility.mask is None
        assert visibility.causal
        assert bounds(visibility) == expected
    with torch.no_grad(), oracle().attached(model):
        truth = model(ids, attention_mask=mask).logits
    tokens_of = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert_close(logits[tokens_of], truth[tokens_of])


def test_windows_are_one_number(seen: list[Visibility]) -> None:
    run(tiny("gemma3_text"), tokens(2, 20))
    assert [visibility.window for visibility in seen] == [WINDOW, None, WINDOW, None, WINDOW]
    assert all(visibility.mask is None for visibility in seen)


def test_chunks_are_one_number_to_the_op(seen: list[Visibility]) -> None:
    model = tiny("llama4_text")
    run(model, tokens(2, 20), attention_mask=padding("1" * 20, "0" * 5 + "1" * 15))
    kinds = model.config.layer_types
    assert [visibility.chunk for visibility in seen] == [8 if kind == "chunked_attention" else None for kind in kinds]
    assert all(visibility.mask is None and bounds(visibility) == ([0, 5], [20, 20]) for visibility in seen)


def test_windowed_layers_number_their_keys_by_slot(seen: list[Visibility]) -> None:
    """Decoding beyond the window: full layers hold every key, windowed ones the last few, and slots tell which."""
    model = tiny("gemma3_text")
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        cache = model(tokens(1, 20), use_cache=True).past_key_values
        seen.clear()
        model(tokens(1, 1), past_key_values=cache)
    assert [visibility.query_offset for visibility in seen] == [20] * LAYERS
    assert [visibility.key_offset for visibility in seen] == [20 - WINDOW + 1, 0] * 2 + [20 - WINDOW + 1]


def test_holes_take_the_general_mask(seen: list[Visibility]) -> None:
    model, ids = tiny("mistral"), tokens(2, 12)
    mask = padding("111111111111", "001101101111")
    logits = run(model, ids, attention_mask=mask)
    assert all(visibility.mask is not None and visibility.mask.shape == (2, 1, 12, 12) for visibility in seen)
    with torch.no_grad(), oracle().attached(model):
        truth = model(ids, attention_mask=mask).logits
    assert_close(logits[mask.bool()], truth[mask.bool()])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "qwen3", "gpt_neox", "olmo2"])
def test_several_texts_in_one_row_keep_apart(name: str, seen: list[Visibility]) -> None:
    """Packed sequences, told by their positions: the general mask, and each text as if it were alone."""
    model, ids = tiny(name), tokens(1, 16)
    positions = torch.cat([torch.arange(6), torch.arange(10)])[None]
    packed = run(model, ids, position_ids=positions, use_cache=False)
    assert all(visibility.mask is not None for visibility in seen)
    for text in (slice(0, 6), slice(6, 16)):
        assert_close(packed[0, text], run(model, ids[:, text])[0])


def odd_keys(batch: Any, head: Any, query: Any, key: Any) -> Any:
    """A pattern that nobody knows: every second key is hidden."""
    return key % 2 == 1


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_a_model_whose_mask_nobody_recognises(
    name: str, seen: list[Visibility], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The general mask, in prefill and in decoding."""
    model, ids = tiny(name), tokens(2, 14)
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(module, "create_causal_mask", partial(module.create_causal_mask, and_mask_function=odd_keys))
    with torch.no_grad(), oracle().attached(model):
        expected = model(ids).logits
    logits = run(model, ids)
    assert all(visibility.mask is not None for visibility in seen)
    assert_close(logits, expected)
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        cache = model(ids[:, :10], use_cache=True).past_key_values
        last = model(ids[:, 10:], past_key_values=cache).logits
    assert_close(last, expected[:, 10:])


def test_what_a_mask_that_nobody_recognises_says() -> None:
    from attnrb.hosts.transformers.attention import GEOMETRY
    from attnrb.hosts.transformers.masks import attention_mask
    from transformers import masking_utils

    function = masking_utils.and_masks(masking_utils.causal_mask_function, odd_keys)
    position = {"q_length": 3, "q_offset": 4}
    if "cache_position" in masking_utils.sdpa_mask.__code__.co_varnames:
        position = {"cache_position": torch.arange(4, 7)}
    mask = attention_mask(batch_size=2, kv_length=6, kv_offset=1, mask_function=function, **position)
    visibility = getattr(mask, GEOMETRY).visibility
    expected = [[slot % 2 == 1 and slot <= query for slot in range(1, 7)] for query in range(4, 7)]
    assert visibility.mask[0, 0].tolist() == expected
    assert (visibility.causal, visibility.query_offset, visibility.key_offset) == (False, 4, 1)


@pytest.mark.parametrize("additive", [False, True])
def test_a_4d_mask_of_the_users_own(additive: bool) -> None:
    """A prefix that sees all of itself: it comes as the user made it, and for the tokens after a cache too."""
    model, ids = tiny("llama"), tokens(2, 12)
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    visible[:5, :5] = True
    visible = visible.expand(2, 1, 12, 12)
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min) if additive else visible
    slots = DenseOracle(linear_gains(LAYERS, 0.5), threshold=0.05)
    real = slots._attention

    def with_slots(module: Any, q: Any, k: Any, v: Any, given: Tensor, **kwargs: Any) -> Any:
        given = visible[..., -q.shape[2] :, :] if given.dim() == 4 else given
        given = given.clone()
        given._slots = 0, 0  # type: ignore[attr-defined]
        return real(module, q, k, v, given, **kwargs)

    slots._attention = with_slots  # type: ignore[method-assign]
    with torch.no_grad(), slots.attached(model):
        expected = model(ids, attention_mask=visible).logits
    assert_close(run(model, ids, attention_mask=mask), expected)
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        cache = model(ids[:, :8], attention_mask=mask[..., :8, :8], use_cache=True).past_key_values
        last = model(ids[:, 8:], attention_mask=mask[..., 8:, :], past_key_values=cache).logits
    assert_close(last, expected[:, 8:])


def test_additive_masks_that_bias_are_refused() -> None:
    model = tiny("llama")
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., 2] = -1.0
    with pytest.raises(NotImplementedError, match="attention_mask: attnrb supports additive masks of 0"):
        run(model, tokens(1, 6), attention_mask=mask)


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_that_loses_a_dimension_on_its_way_is_refused(additive: bool) -> None:
    model, ids = tiny("llama"), tokens(1, 6)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)

    def flatten(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"][0]}

    model.model.layers[2].self_attn.register_forward_pre_hook(flatten, with_kwargs=True)
    with pytest.raises(NotImplementedError, match=r"attention_mask: the model changed the mask \(1, 6, 6\)"):
        run(model, ids, attention_mask=mask)


def test_the_callers_mask_stays_as_it_was() -> None:
    mask = padding("0011", "1111").bool()
    run(tiny("llama"), tokens(2, 4), attention_mask=mask)
    assert not vars(mask)


@pytest.mark.parametrize("name", ["llama", "mistral", "llama4_text"])
def test_no_matrix_of_all_queries_and_keys(name: str) -> None:
    """No tensor with an entry for every pair of a query and a key is made for a long padded batch."""
    length = 3000
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for each in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(each, Tensor):
                    largest = max(largest, each.untyped_storage().nbytes())
            return result

    model = tiny(name)
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, :1000] = 0
    with Watch(), torch.no_grad(), attnrb.patch(model, CONFIG):
        model.model(tokens(2, length), attention_mask=mask, use_cache=False)
    assert 0 < largest < length * length
