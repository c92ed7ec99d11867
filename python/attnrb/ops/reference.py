"""The method in NumPy float64, slow and obvious: the truth that every op is tested against.

Everything here is dense: an ``[B, H, M, N]`` array of weights is built, looked at and multiplied, so that each line
can be read beside the formula it stands for (docs/method.md). The names and arguments are those of
:mod:`attnrb.functional`; inputs may be NumPy arrays or torch tensors of any real dtype, results are NumPy arrays of
float64 (indices and counts int32).

Axes, everywhere: B batch, H query heads, Hk key/value heads, M queries, N keys, D query/key width, Dv value width.
Query i of sequence b sits at slot ``query_offset[b] + i``, key j at slot ``key_offset + j``.

Note: [Edited attention]
With s_ij the score of query i and key j after scale and softcap, beta_j the key bias at the key's slot (0 behind its
end), r_b the first query that it holds for, S_i the outliers of row i, and g the gain of its head:

    t_ij = s_ij + [slot_i >= r_b] beta_j        beta_j = -inf: the query does not see the key
    P    = softmax(t) over the visible keys, the sink joining the sum
    m_i  = sum_{j in S_i} P_ij,   u_i = sum_{j in S_i} P_ij v_j
    y_i  = a(m_i) sum_j P_ij v_j + b(m_i) u_i

    rule   a(m)                       b(m)             the row sums to
    none   1                          g                1 + g m
    row    1 / (1 + g m)              g / (1 + g m)    1: as if ln(1 + g) had been added to the scores of S_i
    rest   (1 - (1+g) m) / (1 - m)    (1 + g) - a      1: S_i has (1 + g) times its share, the others the difference

1 - m is the weight of all that is not in S_i, the sink included. Where it is 0, rule rest has nobody to share with and
leaves the row plain. With rule row and g = -1 nothing is left of such a row: it becomes one that sees no key. The
log-sum-exp is that of t, and with rule row ln(1 + g m) more. Outliers are emitted by P: above the threshold, the
query's own key excluded. (`none`: arXiv 2403.14932; `row`: its normalised form; `rest`: arXiv 2406.15765.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from attnrb.ops.edit import Edit
    from attnrb.ops.visibility import Visibility

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Ints: TypeAlias = NDArray[np.int32]

__all__ = [
    "Floats",
    "OutlierRows",
    "ResolvedEdit",
    "ResolvedVisibility",
    "attention",
    "attention_weights",
    "edited_attention_weights",
    "edited_weights",
    "gain_schedule",
    "held_mask",
    "outlier_capacity",
    "outlier_mask",
    "outlier_rows",
    "rebalance",
    "rebalanced_attention",
    "rebalanced_weights",
    "received_attention",
    "resolve_visibility",
    "source_attention",
    "visible",
    "weighted_values",
]


class OutlierRows(NamedTuple):
    """Outlier sets as the ops carry them: indices int32 [B,H,M,C], ascending slots then -1; counts int32 [B,H,M]."""

    indices: Ints
    counts: Ints


class ResolvedVisibility(NamedTuple):
    """A visibility with its defaults filled in for M queries and N keys; the fields of ``attnrb.Visibility``."""

    causal: bool
    query_offset: Any
    key_offset: int = 0
    window: int | None = None
    key_start: Any = None
    key_end: Any = None
    mask: Any = None
    chunk: int | None = None


class ResolvedEdit(NamedTuple):
    """The fields of ``attnrb.Edit``, which may be NumPy arrays here."""

    outliers: tuple[Any, Any] | None = None
    gain: Any = None
    rule: str = "none"
    key_bias: Any = None
    first_query: Any = None


def _array(values: Any) -> NDArray[Any]:
    """A NumPy view or copy of an array or a torch tensor; bfloat16, which NumPy lacks, goes through float64 exactly."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
        values = values.numpy()
    return np.asarray(values)


def _floats(values: Any) -> Floats:
    return _array(values).astype(np.float64)


def resolve_visibility(queries: int, keys: int, visibility: Visibility | Any | None = None) -> ResolvedVisibility:
    """Fills in what a visibility leaves open.

    ``None`` is causal with the last query on the last key's slot; a bare boolean array stands for its mask; a mask
    makes causality opt-in. ``query_offset`` defaults to ``N - M + key_offset``.
    """
    if visibility is None:
        return ResolvedVisibility(True, keys - queries)
    if not hasattr(visibility, "query_offset"):
        return ResolvedVisibility(False, keys - queries, mask=visibility)
    causal = visibility.causal if visibility.causal is not None else visibility.mask is None
    offset = visibility.query_offset
    return ResolvedVisibility(
        causal=causal,
        query_offset=keys - queries + visibility.key_offset if offset is None else offset,
        key_offset=visibility.key_offset,
        window=visibility.window,
        key_start=visibility.key_start,
        key_end=visibility.key_end,
        mask=visibility.mask,
        chunk=visibility.chunk,
    )


def _query_slots(queries: int, v: ResolvedVisibility) -> Any:
    """[1|B,1,M,1]: the slot of each query."""
    return _array(v.query_offset).reshape(-1, 1, 1, 1) + np.arange(queries).reshape(1, 1, queries, 1)


def visible(batch: int, heads: int, queries: int, keys: int, visibility: Visibility | Any | None = None) -> Bools:
    """Which keys each query sees, bool [B,H,M,N]: every condition that is set must hold."""
    v = resolve_visibility(queries, keys, visibility)
    query_slot = _query_slots(queries, v)
    key_slot = (v.key_offset + np.arange(keys)).reshape(1, 1, 1, keys)
    seen = np.ones((batch, heads, queries, keys), dtype=bool)
    if v.causal:
        seen &= key_slot <= query_slot
    if v.window is not None:
        seen &= key_slot > query_slot - v.window
    if v.chunk is not None:
        origin = 0 if v.key_start is None else _array(v.key_start).reshape(batch, 1, 1, 1)
        seen &= (key_slot - origin) // v.chunk == (query_slot - origin) // v.chunk
    if v.key_start is not None:
        seen &= key_slot >= _array(v.key_start).reshape(batch, 1, 1, 1)
    if v.key_end is not None:
        seen &= key_slot < _array(v.key_end).reshape(batch, 1, 1, 1)
    if v.mask is not None:
        seen &= np.broadcast_to(_array(v.mask), seen.shape)
    return seen


def biases(
    key_bias: Any, first_query: Any, shape: tuple[int, int, int, int], visibility: Visibility | Any | None
) -> Floats:
    """What ``key_bias`` [B|1,H|1,N'] adds to each score, [B,H,M,N].

    0 for keys at slots from N' on, and for queries before ``first_query``, a slot or [B].
    """
    batch, heads, queries, keys = shape
    v = resolve_visibility(queries, keys, visibility)
    bias = _floats(key_bias)
    slots = v.key_offset + np.arange(keys)
    of_keys = np.zeros((batch, heads, 1, keys))
    reached = slots < bias.shape[2]
    of_keys[..., reached] = bias[:, :, None, slots[reached]]
    if first_query is None:
        return np.broadcast_to(of_keys, shape)
    return np.where(_query_slots(queries, v) >= _array(first_query).reshape(-1, 1, 1, 1), of_keys, 0.0)


def attention_weights(
    query: Any,
    key: Any,
    *,
    scale: float | None = None,
    visibility: Visibility | Any | None = None,
    softcap: float | None = None,
    sinks: Any | None = None,
    key_bias: Any | None = None,
    first_query: Any | None = None,
) -> tuple[Floats, Floats]:
    """Softmax weights [B,H,M,N] and the log-sum-exp [B,H,M] of each row: P of Note: [Edited attention].

    ``scale`` defaults to ``1/sqrt(D)``. ``softcap`` replaces a score s by ``softcap * tanh(s / softcap)``. ``sinks``
    [H] are scores without a key: they join the denominator, hence the log-sum-exp, and nothing else. A row that sees
    no key has weights zero and log-sum-exp -inf, with sinks too. A score that is not finite spoils the rows that see
    it, no other.
    """
    q, k = _floats(query), _floats(key)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    k = np.repeat(k, heads // k.shape[1], axis=1)
    scale = 1.0 / math.sqrt(width) if scale is None else scale
    seen = visible(batch, heads, queries, keys, visibility)

    with np.errstate(invalid="ignore", over="ignore"):
        scores = scale * (q @ k.swapaxes(2, 3))
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        if key_bias is not None:
            bias = biases(key_bias, first_query, (batch, heads, queries, keys), visibility)
            seen = seen & (bias != -np.inf)
            scores = scores + bias
    scores = np.where(seen, scores, -np.inf)
    if sinks is not None:
        sink = np.broadcast_to(_floats(sinks).reshape(1, heads, 1, 1), (batch, heads, queries, 1))
        scores = np.concatenate([scores, sink], axis=3)

    sees_any = seen.any(axis=3, keepdims=True)
    if scores.shape[3] == 0:
        return np.zeros(seen.shape), np.full((batch, heads, queries), -np.inf)
    # exp(s - max) leaves the ratio alone and cannot overflow.
    peak = np.where(sees_any, scores.max(axis=3, keepdims=True), 0.0)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        shares = np.exp(scores - peak)
        total = shares.sum(axis=3, keepdims=True)
        weights = np.where(sees_any & seen, (shares / total)[..., :keys], 0.0)
        lse = np.where(sees_any, peak + np.log(total), -np.inf)
    return weights, lse[..., 0]


def _seen(weights: Floats, visibility: Visibility | Any | None, edit: ResolvedEdit | Edit | None = None) -> Bools:
    batch, heads, queries, keys = weights.shape
    seen = visible(batch, heads, queries, keys, visibility)
    if edit is None or edit.key_bias is None:
        return seen
    removed = biases(edit.key_bias, edit.first_query, (batch, heads, queries, keys), visibility) == -np.inf
    return np.asarray(seen & ~removed)


def weighted_values(weights: Floats, value: Any, seen: Bools) -> Floats:
    """``weights @ value`` [B,H,M,Dv]; what a query does not see cannot reach it, not even as ``0 * NaN``."""
    v = _floats(value)
    v = np.repeat(v, weights.shape[1] // v.shape[1], axis=1)
    if np.isfinite(v).all():
        return np.asarray(weights @ v)
    output = np.zeros((*weights.shape[:3], v.shape[3]))
    with np.errstate(invalid="ignore"):
        for b, h, i in np.ndindex(*weights.shape[:3]):
            js = np.flatnonzero(seen[b, h, i])
            output[b, h, i] = weights[b, h, i, js] @ v[b, h, js]
    return output


def outlier_capacity(threshold: float, keys: int) -> int:
    """The most outliers a row can have: a row sums to 1, so fewer than 1/threshold entries exceed the threshold."""
    return min(math.ceil(1.0 / threshold) - 1, keys)


def outlier_mask(
    weights: Any, threshold: float = 0.01, *, query_offset: Any | None = None, key_offset: int = 0
) -> Bools:
    """Bool [B,H,M,N]: weights strictly above ``threshold``, never the query's own key.

    ``query_offset`` is a slot, or one for each sequence, [B]; it defaults to ``N - M + key_offset``. A NaN is not above
    anything.
    """
    w = _floats(weights)
    queries, keys = w.shape[2:]
    offset = keys - queries + key_offset if query_offset is None else query_offset
    own = _array(offset).reshape(-1, 1, 1, 1) + np.arange(queries).reshape(1, 1, queries, 1)
    return np.asarray((w > threshold) & (key_offset + np.arange(keys) != own))


def outlier_rows(mask: Bools, capacity: int, key_offset: int = 0) -> OutlierRows:
    """A mask [B,H,M,N] as rows of ascending key slots padded with -1 (Note: [Outlier capacity])."""
    counts = np.minimum(mask.sum(axis=3), capacity)
    # A stable sort puts the true entries first and keeps them in order.
    slots = key_offset + np.argsort(~mask, axis=3, kind="stable")[..., :capacity]
    indices = np.where(np.arange(capacity) < counts[..., None], slots, -1)
    return OutlierRows(indices.astype(np.int32), counts.astype(np.int32))


def held_mask(indices: Any, counts: Any, seen: Bools, key_offset: int = 0) -> Bools:
    """The inverse of :func:`outlier_rows`, as a layer applies it: slots it does not hold or may not see are skipped.

    One list may serve all rows of a head: indices [B,H,1,C], counts [B,H,1].
    """
    indices, counts = _array(indices), _array(counts)
    keys = seen.shape[3]
    indices = np.broadcast_to(indices, (*seen.shape[:3], indices.shape[3]))  # [B,H,1,C] serves all rows
    counts = np.broadcast_to(counts, seen.shape[:3])
    js = indices.astype(np.int64) - key_offset
    held = (np.arange(js.shape[3]) < counts[..., None]) & (js >= 0) & (js < keys)
    mask = np.zeros((*seen.shape[:3], keys + 1), dtype=bool)
    np.put_along_axis(mask, np.where(held, js, keys), True, axis=3)  # column `keys` takes what is not held
    return mask[..., :keys] & seen


def _per_head(gain: float | Sequence[float] | Any) -> Floats:
    return _floats(gain).reshape(1, -1, 1, 1)


def rebalance(weights: Any, mask: Any, gain: float | Sequence[float] | Any, *, normalize: bool = False) -> Floats:
    """Weights [B,H,M,N] with those under ``mask`` multiplied by ``1 + gain`` (one gain, or one per head).

    ``normalize`` divides each row by its new sum; a row that sums to zero stays as it is. A mask that is true
    everywhere is ``boost_all``, the published code's ``boosting_self``.
    """
    w = _floats(weights)
    boosted = np.where(np.broadcast_to(_array(mask), w.shape), w * (1.0 + _per_head(gain)), w)
    if not normalize:
        return boosted
    total = boosted.sum(axis=3, keepdims=True)
    return np.asarray(np.divide(boosted, total, out=boosted.copy(), where=total != 0.0))


def edited_weights(
    weights: Floats, lse: Floats, mask: Bools, gain: float | Sequence[float] | Any, rule: str, sink: Floats
) -> tuple[Floats, Floats]:
    """The weights after the rule, and the log-sum-exp that goes with them: Note: [Edited attention].

    Args:
        weights: P [B,H,M,N].
        lse: [B,H,M].
        mask: the outliers S [B,H,M,N].
        gain: g, one or one per head.
        rule: none, row or rest.
        sink: the sink's weight in each row, [B,H,M,1].
    """
    g = _per_head(gain)
    boosted = np.where(mask, weights * (1.0 + g), weights)
    if rule == "none":
        return boosted, lse
    mass = np.where(mask, weights, 0.0).sum(axis=3, keepdims=True)
    # 1 - mass, without the rounding of that difference.
    rest = np.where(mask, 0.0, weights).sum(axis=3, keepdims=True) + sink
    with np.errstate(invalid="ignore", divide="ignore"):
        if rule == "row":
            z = np.where(lse[..., None] == -np.inf, 1.0, rest + (1.0 + g) * mass)
            return np.where(z == 0.0, 0.0, boosted / z), lse + np.log(z[..., 0])
        assert rule == "rest", rule
        share = (rest - g * mass) / rest
        return np.where(rest == 0.0, weights, np.where(mask, boosted, share * weights)), lse


def rebalanced_weights(
    weights: Floats, lse: Floats, mask: Bools, gain: float | Sequence[float] | Any, *, normalize: bool = False
) -> tuple[Floats, Floats]:
    """What :func:`rebalance` means inside attention: :func:`edited_weights` with the rule ``row`` or ``none``.

    Normalised rows are divided by ``z = 1 + gain * (sum of the row's outlier weights)`` and their log-sum-exp grows
    by ``ln z``. Without sinks z is the new sum of the row; with them the sink's share is part of the row, is never
    boosted, and shrinks with the rest.
    """
    sink = 1.0 - weights.sum(axis=3, keepdims=True)
    return edited_weights(weights, lse, mask, gain, "row" if normalize else "none", sink)


def edited_attention_weights(
    query: Any,
    key: Any,
    *,
    edit: Edit | ResolvedEdit | None = None,
    scale: float | None = None,
    visibility: Visibility | Any | None = None,
    softcap: float | None = None,
    sinks: Any | None = None,
) -> tuple[Floats, Floats]:
    """The weights [B,H,M,N] that the values are weighed by, and the log-sum-exp [B,H,M] of each row."""
    edit = ResolvedEdit() if edit is None else edit
    scores: dict[str, Any] = {"scale": scale, "visibility": visibility, "softcap": softcap, "sinks": sinks}
    weights, lse = attention_weights(query, key, key_bias=edit.key_bias, first_query=edit.first_query, **scores)
    if edit.gain is None:
        return weights, lse
    mask = seen = _seen(weights, visibility, edit)  # without outliers every visible key is one
    if edit.outliers is not None:
        queries, keys = weights.shape[2:]
        indices, counts = edit.outliers
        mask = held_mask(indices, counts, seen, resolve_visibility(queries, keys, visibility).key_offset)
    sink = np.zeros((*lse.shape, 1))
    if sinks is not None:
        with np.errstate(over="ignore"):
            sink = np.where(lse == -np.inf, 0.0, np.exp(_floats(sinks)[:, None] - lse))[..., None]
    return edited_weights(weights, lse, mask, edit.gain, edit.rule, sink)


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    edit: Edit | ResolvedEdit | None = None,
    emit: float | None = None,
    visibility: Visibility | Any | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Any | None = None,
) -> tuple[Floats, Floats, OutlierRows | None]:
    """Edited attention: output [B,H,M,Dv], log-sum-exp [B,H,M], and the outliers where a threshold to emit is given."""
    edit = ResolvedEdit() if edit is None else edit
    scores: dict[str, Any] = {"scale": scale, "visibility": visibility, "softcap": softcap, "sinks": sinks}
    weights, lse = edited_attention_weights(query, key, edit=edit, **scores)
    output = weighted_values(weights, value, _seen(weights, visibility, edit))
    if emit is None:
        return output, lse, None
    shares, _ = attention_weights(query, key, key_bias=edit.key_bias, first_query=edit.first_query, **scores)
    queries, keys = weights.shape[2:]
    v = resolve_visibility(queries, keys, visibility)
    mask = outlier_mask(shares, emit, query_offset=v.query_offset, key_offset=v.key_offset)
    return output, lse, outlier_rows(mask, outlier_capacity(emit, keys), v.key_offset)


def source_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    threshold: float = 0.01,
    scale: float | None = None,
    visibility: Visibility | Any | None = None,
    softcap: float | None = None,
    sinks: Any | None = None,
) -> tuple[Floats, Floats, OutlierRows]:
    """Plain attention that also reports each query's outliers: output [B,H,M,Dv], log-sum-exp [B,H,M], outlier rows."""
    output, lse, rows = attention(
        query, key, value, emit=threshold, scale=scale, visibility=visibility, softcap=softcap, sinks=sinks
    )
    assert rows is not None
    return output, lse, rows


def rebalanced_attention(
    query: Any,
    key: Any,
    value: Any,
    outliers: tuple[Any, Any],
    gain: float | Sequence[float] | Any,
    *,
    normalize: bool = False,
    scale: float | None = None,
    visibility: Visibility | Any | None = None,
    softcap: float | None = None,
    sinks: Any | None = None,
) -> Floats:
    """Attention with the entries that ``outliers`` (indices, counts) names strengthened: output [B,H,M,Dv]."""
    edit = ResolvedEdit(outliers, gain, "row" if normalize else "none")
    scores: dict[str, Any] = {"scale": scale, "visibility": visibility, "softcap": softcap, "sinks": sinks}
    return attention(query, key, value, edit=edit, **scores)[0]


def received_attention(
    query: Any,
    key: Any,
    *,
    scale: float | None = None,
    visibility: Visibility | Any | None = None,
    softcap: float | None = None,
    sinks: Any | None = None,
) -> Floats:
    """[B,H,N]: the mean weight that each key receives from the queries that can see it; 0 where none can."""
    weights, _ = attention_weights(query, key, scale=scale, visibility=visibility, softcap=softcap, sinks=sinks)
    onlookers = _seen(weights, visibility).sum(axis=2)
    return np.asarray(weights.sum(axis=2) / np.maximum(onlookers, 1))


def gain_schedule(alpha: float, layers: int, *, depth: int | None = None, source_layer: int = 0) -> Floats:
    """The gain of each of ``layers`` layers: ``alpha * (1 - layer/depth)`` below the source layer, 0 up to and with it.

    ``depth`` defaults to ``layers - 1``, which makes the last layer's gain 0. A single layer has no gain.
    """
    depth = layers - 1 if depth is None else depth
    return np.array([alpha * (1.0 - layer / depth) if layer > source_layer else 0.0 for layer in range(layers)])
