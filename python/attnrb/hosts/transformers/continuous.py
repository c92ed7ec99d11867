"""Continuous batching: ``generate_batch`` of transformers 5.23, whose forwards hold the queries of many texts.

Note: [Blocks of one row]
transformers keeps keys in blocks of a cache of its own, which writes a layer's new keys and hands out those of all
texts, one text after the other: ``[1, Hk, keys of all texts, D]``. Two tables say where the queries and the keys of
each text begin. To attnrb's op that is a pool of blocks of one row each: key j of text b is block ``start[b] + j``.

Nothing says which request a text belongs to, so spans have no place here, nor has what a policy keeps of a text; and a
cache may share the keys of a prompt's beginning between requests, so one policy must have been in force all along.
"""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrb.hosts.ragged import BatchView
from attnrb.ops.edit import NO_EDIT, edit_arguments
from attnrb.ops.paged import attend_blocks
from attnrb.ops.paging import PagingArguments
from attnrb.ops.scores import score_arguments
from attnrb.ops.visibility import Visibility, visibility_arguments
from attnrb.policies.base import LayerPlan, Mixture

if TYPE_CHECKING:
    from attnrb.hosts.session import Forward

__all__ = ["Continuous", "ContinuousStep"]

_PREFIX = "continuous batching (generate_batch)"


class Continuous:
    """The caches of continuous batching with which a patched model was called, and the policy of the keys in each."""

    def __init__(self) -> None:
        self._plans: weakref.WeakKeyDictionary[Any, LayerPlan] = weakref.WeakKeyDictionary()

    def step(self, kwargs: dict[str, Any], plan: LayerPlan, *, observed: bool) -> ContinuousStep | None:
        """What a forward's keyword arguments say of its texts; None where it is no step of continuous batching.

        Args:
            kwargs: of the decoder's forward.
            plan: in force.
            observed: whether someone looks at every layer, or wants its weights.

        Raises:
            NotImplementedError: it cannot be served; the message says why.
        """
        cache = kwargs.get("cache")
        if cache is None or "cu_seq_lens_q" not in kwargs:
            return None
        if why := _refused(cache, kwargs, plan, observed=observed):
            raise NotImplementedError(f"{_PREFIX}: {why}")
        known = self._plans.get(cache)
        if known is not plan and (known is not None or _holds_keys(cache)):
            raise NotImplementedError(
                f"{_PREFIX}: the cache holds keys that were computed under another policy, or none: call "
                "model.destroy_cached_continuous_batching_manager() first, or start another manager"
            )
        self._plans[cache] = plan
        return ContinuousStep(cache, kwargs["cu_seq_lens_q"])


def _refused(cache: Any, kwargs: dict[str, Any], plan: LayerPlan, *, observed: bool) -> str | None:
    """What is not served here, as part of a sentence."""
    if torch.compiler.is_compiling():
        return "attnrb does not serve it in a graph of torch.compile"
    if "kwargs" not in inspect.signature(cache.update).parameters:
        return "attnrb serves that of transformers 5.23 or newer"
    if set(kwargs["cu_seq_lens_k"]) != {"full_attention"}:
        return "attnrb serves models whose layers all see the whole text, and this one has windows"
    if kwargs.get("block_table") is not None:
        return "a kernel of transformers' own is to read the blocks (max_blocks_per_request): set it to 0"
    if plan.wants_spans:
        return "which request a text belongs to is not known here, so no spans can be: use model.generate, or vLLM"
    if plan.keeps or plan.reads_keys:
        return "this policy looks at texts one by one, and here they come together: use model.generate, or vLLM"
    if observed:
        return "an observer, or weights that are returned, would need texts one by one: use model.generate"
    return None


def _holds_keys(cache: Any) -> bool:
    """Whether keys of former requests lie in a cache, ready to be shared with new ones."""
    return any(each.ledger.block_to_hash for each in cache.cache_allocators.values())


class ContinuousStep:
    """One step: where the queries of each text lie, and for its layers, where the keys do.

    Args:
        cache: of transformers.
        starts: int32 ``[B + 1]``: the first query of each text, and T.
    """

    def __init__(self, cache: Any, starts: Tensor) -> None:
        self._cache, self._starts = cache, starts
        self._paging: PagingArguments | None = None

    def attention(
        self,
        forward: Forward,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        softcap: float | None,
        sinks: Tensor | None,
        others: dict[str, Any],
    ) -> Tensor:
        """The attention of one layer, edited where the policy says so.

        Args:
            forward: of which it is a layer.
            layer: which one.
            query: ``[1, H, T, D]``.
            key: ``[1, Hk, T, D]``, the new ones.
            value: ``[1, Hk, T, Dv]``.
            scale: factor on the scores; None: ``1 / sqrt(D)``.
            softcap: bound of the scores; None or 0: none.
            sinks: ``[H]``, the model's own.
            others: what else transformers told this layer, for its cache.

        Returns:
            ``[1, T, H, Dv]``.
        """
        key, value = self._cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=others)
        if self._paging is None:  # the same for all layers, whose keys are of one kind
            self._paging = _paging(self._starts, others["cu_seq_lens_k"], int(others["max_length_k"]))
        queries, keys, values = query[0].transpose(0, 1), _pool(key), _pool(value)
        output = queries.new_zeros(*queries.shape[:2], value.shape[3])
        emit, edited = forward.steps[layer] or (None, False)
        arguments = NO_EDIT
        if edited:
            rows = self._starts.shape[0] - 1
            edit = forward.session.edit(BatchView(layer, queries, keys, rows))
            assert not isinstance(edit, Mixture), "only spans are weighed, and there are none"
            arguments = edit_arguments(edit, queries, rows)
        scores = score_arguments(scale, softcap, sinks)
        found = attend_blocks(queries, keys, values, self._paging, arguments, emit, _SEEING, scores, output)
        if found is not None:
            forward.emitted(layer, found, None)
        return output[None]


_SEEING = visibility_arguments(Visibility())


def _pool(gathered: Tensor) -> Tensor:
    """Keys or values ``[1, Hk, N, D]`` as blocks of one row: ``[N, Hk, 1, D]``."""
    rows = gathered[0].transpose(0, 1)
    return (rows if rows.stride(-1) == 1 else rows.contiguous())[:, :, None]


def _paging(starts: Tensor, key_starts: Tensor, longest: int) -> PagingArguments:
    """See Note: [Blocks of one row]. ``longest``: keys of the longest text."""
    table = key_starts[:-1, None] + torch.arange(longest, dtype=torch.int32, device=key_starts.device)
    return PagingArguments(table, starts, key_starts[1:] - key_starts[:-1])
