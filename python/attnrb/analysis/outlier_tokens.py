"""Tokens that receive far more attention than the rest of their text, and those among them that are sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from attnrb.text.classes import Token, TokenClass

Floats = NDArray[np.float64]

DEFAULT_Z_THRESHOLD = 3.5
"""The limit that Iglewicz and Hoaglin recommend."""

MIN_SINK_SHARE = 0.01
"""The least share of a layer's attention that makes an outlier token a sink."""

_MOST_POSITIONS = 20  # positions of one sink that are kept


def robust_z_scores(received: Floats) -> Floats:
    """How unusual the attention that each token receives is: the modified z-score of its logarithm.

    The method is that of Iglewicz and Hoaglin (*How to Detect and Handle Outliers*, 1993): with x = ln received,
    ``z = (x - median) / (1.4826 · MAD)``, where MAD is the median of ``|x - median|``. Median and MAD do not notice the
    outliers themselves, as mean and standard deviation would; 1.4826 · MAD is the standard deviation of normal data.
    Where MAD is 0, ``1.2533`` times the mean of ``|x - median|`` takes the place of the divisor, and z is 0 where that
    is 0 too.

    Args:
        received: ``[..., n]``, at least 0: attention received by the n tokens of a text.

    Returns:
        float64 ``[..., n]``. A token is an outlier where its score exceeds a threshold, `DEFAULT_Z_THRESHOLD` unless
        chosen otherwise: only above, since a token that receives little is no sink.
    """
    x = np.log(np.maximum(np.asarray(received, dtype=np.float64), np.finfo(np.float32).tiny))
    deviation = x - np.median(x, axis=-1, keepdims=True)
    spread = 1.482602218505602 * np.median(np.abs(deviation), axis=-1, keepdims=True)
    fallback = 1.2533141373155003 * np.mean(np.abs(deviation), axis=-1, keepdims=True)
    divisor = np.where(spread > 0, spread, fallback)
    scores: Floats = np.divide(deviation, divisor, out=np.zeros_like(deviation), where=divisor > 0)
    return scores


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

    A token is a sink of a layer where it is an outlier (`robust_z_scores`) of the attention received there, mean over
    the heads, and takes at least `MIN_SINK_SHARE` of all attention. The second keeps out the last tokens of a text,
    which few queries see: what they receive is a mean over a handful.
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
        scores = robust_z_scores(received)
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
