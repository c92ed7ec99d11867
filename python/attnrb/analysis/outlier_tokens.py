"""Tokens that receive far more attention than the rest of their text, and those among them that are sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnrb.text.classes import Token, TokenClass

Floats = NDArray[np.float64]

DEFAULT_Z_THRESHOLD = 3.5
"""The limit that Iglewicz and Hoaglin recommend."""

MIN_SINK_SHARE = 0.01
"""The least share of a layer's attention that makes an outlier token a sink."""

_MOST_POSITIONS = 20  # positions of one sink that are kept

_LIKE = 2**0.5  # tokens are compared with those that at most this many times as many queries see, or as few
_LEAST_LIKE = 32  # and with at least this many
_LEAST_SLOPE = 12  # tokens that a line is laid through; fewer have one median


def expected_attention(received: Floats) -> Floats:
    """What a token would receive if nothing but its place in the text mattered.

    Note: [Expected attention]
    What a token receives is a mean over the queries that see it. Attention prefers what is near, and the last tokens of
    a text are seen from near only, so their means are high whatever they say: of SmolLM2 on 2,224 tokens of a licence,
    the last 2 % get ten to a hundred times what the first half gets. Dividing by what even attention would give (the
    mean of 1 / (i + 1) over the queries i that see the token) does not mend this, since even attention has no nearness.
    So a token is compared with its like: those that v / √2 to v √2 queries see, where v = n - j see token j, and at
    least 32 tokens. Through x = ln received of these goes Tukey's resistant line in t = ln v, which single outliers do
    not move:

        slope = (median x of the last third - median x of the first third) / (the same of t)
        ln expected_j = slope · t_j + median of (x - slope · t)

    It is computed at values of v half an octave apart and read in between on logarithmic scales, so that a text
    costs a few passes. In a text of fewer than 12 tokens the slope is 0.

    Args:
        received: ``[..., n]``, at least 0: attention received by the n tokens of a text.

    Returns:
        float64 ``[..., n]``, above 0.
    """
    x = _logarithm(received)
    count = x.shape[-1]
    seen_by = np.unique(np.rint(np.geomspace(1, count, 1 + 2 * max(1, int(np.ceil(np.log2(count)))))).astype(int))
    at = np.log(count - np.arange(count))
    values = np.stack([_resistant(x, at, _like(int(each), count), float(np.log(each))) for each in seen_by], axis=-1)
    above = np.clip(np.searchsorted(np.log(seen_by), at), 1, max(1, len(seen_by) - 1))
    if len(seen_by) == 1:
        return np.exp(np.broadcast_to(values, x.shape))
    low, high = np.log(seen_by[above - 1]), np.log(seen_by[above])
    part = (at - low) / (high - low)
    expected: Floats = np.exp(values[..., above - 1] * (1 - part) + values[..., above] * part)
    return expected


def _resistant(x: Floats, at: Floats, like: slice, where: float) -> Floats:
    """The value at ``where`` of the resistant line through ``x [..., n]`` over ``at [n]``, of the tokens ``like``."""
    x, at = x[..., like], at[like]
    third = len(at) // 3
    slope = np.zeros((*x.shape[:-1], 1))
    if len(at) >= _LEAST_SLOPE:
        rise = np.median(x[..., -third:], axis=-1) - np.median(x[..., :third], axis=-1)
        slope = (rise / (np.median(at[-third:]) - np.median(at[:third])))[..., None]
    value: Floats = np.median(x - slope * at, axis=-1) + slope[..., 0] * where
    return value


def _like(seen_by: int, count: int) -> slice:
    """The tokens that about so many queries see, of a text of ``count`` tokens."""
    first, last = count - int(seen_by * _LIKE), count - int(np.ceil(seen_by / _LIKE)) + 1
    missing = max(0, _LEAST_LIKE - (last - first))
    first, last = first - missing // 2, last + missing - missing // 2
    first -= max(0, last - count)
    return slice(max(0, first), min(count, max(last, _LEAST_LIKE)))


def outlier_scores(received: Floats) -> Floats:
    """How unusual it is what each token receives: `robust_z_scores` of how many times the expected it is.

    Args:
        received: ``[..., n]``, at least 0: attention received by the n tokens of a text.

    Returns:
        float64 ``[..., n]``. A token is an outlier where its score exceeds a threshold, `DEFAULT_Z_THRESHOLD` unless
        chosen otherwise: only above, since a token that receives little is no sink.
    """
    return unusual(received).scores


def _logarithm(received: Floats) -> Floats:
    return np.asarray(np.log(np.maximum(np.asarray(received, dtype=np.float64), np.finfo(np.float32).tiny)))


def robust_z_scores(received: Floats) -> Floats:
    """How unusual each of n positive numbers is: the modified z-score of its logarithm.

    The method is that of Iglewicz and Hoaglin (*How to Detect and Handle Outliers*, 1993): with x = ln received,
    ``z = (x - median) / (1.4826 · MAD)``, where MAD is the median of ``|x - median|``. Median and MAD do not notice the
    outliers themselves, as mean and standard deviation would; 1.4826 · MAD is the standard deviation of normal data.
    Where MAD is 0, ``1.2533`` times the mean of ``|x - median|`` takes the place of the divisor, and z is 0 where that
    is 0 too.

    Args:
        received: ``[..., n]``, at least 0.

    Returns:
        float64 ``[..., n]``.
    """
    return _robust(_logarithm(received)).scores


class Unusual(NamedTuple):
    """Scores ``[..., n]``, and what turns them back into logarithms: ``scores · spread + centre``; ``[..., 1]``."""

    scores: Floats
    centre: Floats
    spread: Floats


def unusual(received: Floats) -> Unusual:
    """`outlier_scores`, from which ``received / expected_attention(received)`` can be had back."""
    return _robust(_logarithm(received) - np.log(expected_attention(received)))


def _robust(x: Floats) -> Unusual:
    centre = np.median(x, axis=-1, keepdims=True)
    deviation = x - centre
    spread = 1.482602218505602 * np.median(np.abs(deviation), axis=-1, keepdims=True)
    fallback = 1.2533141373155003 * np.mean(np.abs(deviation), axis=-1, keepdims=True)
    divisor = np.where(spread > 0, spread, fallback)
    scores = np.divide(deviation, divisor, out=np.zeros_like(deviation), where=divisor > 0)
    return Unusual(scores, centre, divisor)


@dataclass(frozen=True)
class Sink:
    """A token on which attention collapses, over all texts in which it does."""

    text: str
    id: int
    token_class: TokenClass
    is_first: bool
    """Whether this is the first token of a text: it is counted apart from the same token elsewhere."""
    count: int
    """How many places in the texts it is a sink at."""
    positions: tuple[int, ...]
    """The first of these places: positions in their texts, at most 20."""
    layers: tuple[int, ...]
    """The layers in which it is one."""
    peak_layer: int
    """The layer in which it takes most."""
    peak_share: float
    """Its share of all attention there, mean over the heads, summed over its places in a text and mean over texts."""
    z_score: float
    """The highest robust z-score in any of these layers."""


@dataclass
class _Tally:
    token: Token
    count: int = 0
    positions: list[int] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)
    z_score: float = 0.0
    texts: int = 0
    share: Floats | None = None


class SinkCounter:
    """Collects the sinks of many texts, one text at a time.

    A token is a sink of a layer where it is an outlier (`outlier_scores`) of the attention received there, mean over
    the heads, and takes at least `MIN_SINK_SHARE` of all attention.
    """

    def __init__(self, z_threshold: float) -> None:
        self.z_threshold = z_threshold
        self._tallies: dict[tuple[int, bool], _Tally] = {}

    def add(self, tokens: Sequence[Token], layers: Sequence[int], received: Floats, share: Floats) -> None:
        """Add a text of n tokens.

        Args:
            tokens: its tokens.
            layers: the numbers of the L layers.
            received: ``[L, n]``, mean over the heads.
            share: ``[L, n]``, likewise.
        """
        scores = outlier_scores(received)
        is_sink = (scores > self.z_threshold) & (share >= MIN_SINK_SHARE)
        seen = set()
        for position in np.flatnonzero(is_sink.any(axis=0)).tolist():
            token = tokens[position]
            key = token.id, position == 0
            tally = self._tallies.setdefault(key, _Tally(token))
            where = np.flatnonzero(is_sink[:, position]).tolist()
            tally.count += 1
            if len(tally.positions) < _MOST_POSITIONS:
                tally.positions.append(position)
            tally.layers.update(layers[place] for place in where)
            tally.z_score = max(tally.z_score, float(scores[where, position].max()))
            tally.share = share[:, position] + (0 if tally.share is None else tally.share)
            if key not in seen:
                seen.add(key)
                tally.texts += 1

    def sinks(self, layers: Sequence[int]) -> tuple[Sink, ...]:
        """All sinks so far, those with the highest peak first."""
        result = []
        for (_, is_first), tally in self._tallies.items():
            assert tally.share is not None
            peak = int(np.argmax(tally.share))
            result.append(
                Sink(
                    text=tally.token.text,
                    id=tally.token.id,
                    token_class=tally.token.token_class,
                    is_first=is_first,
                    count=tally.count,
                    positions=tuple(tally.positions),
                    layers=tuple(sorted(tally.layers)),
                    peak_layer=layers[peak],
                    peak_share=float(tally.share[peak]) / tally.texts,
                    z_score=tally.z_score,
                )
            )
        return tuple(sorted(result, key=lambda sink: (-sink.peak_share, sink.id, not sink.is_first)))
