"""What the harness asks for, and where it keeps answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["RequestError", "check_budget", "check_requests", "name_cache"]

_SHOWN = 40  # characters of a text in an error
_HEEDED = ("min_computed_tokens", "max_computed_tokens", "answer_tokens", "until", "max_gen_toks")
# What leaves a greedy search as it is.
_GREEDY: dict[str, tuple[Any, ...]] = {
    "do_sample": (False, None),
    "num_beams": (1, None),
    "temperature": (0, None),
    "top_k": (0, 1, None),
    "top_p": (1, None),
}


class RequestError(ValueError, AssertionError):
    """A request that has no answer. The harness' own model has assertions there, and this passes for one."""


def check_requests(requests: Sequence[tuple[Any, list[int], list[int]]], window: int) -> None:
    """Refuse what the harness' own model refuses: a score of nothing would be a certain answer, the best of all.

    Args:
        requests: of each the texts (None for parts of a longer text), and the tokens of context and continuation.
        window: tokens that the model takes at most.

    Raises:
        RequestError: a continuation has no token or too many, or a context has none.
    """
    for texts, context, continuation in requests:
        if not continuation:
            raise RequestError(
                f"request: the continuation{_shown(texts, 1)} of the context{_shown(texts, 0)} has no token"
            )
        if not context:
            raise RequestError(f"request: the context{_shown(texts, 0)} has no token")
        if len(continuation) > window:
            raise RequestError(
                f"request: the continuation{_shown(texts, 1)} has {len(continuation):,} tokens, more than the model's "
                f"window of {window:,}"
            )


def check_budget(settings: Mapping[str, Any]) -> None:
    """Refuse settings of a generation that one within a budget of computed tokens cannot heed: it is greedy.

    Args:
        settings: ``generation_kwargs`` of a task, and ``--gen_kwargs``. Ends of a text and its length, which every task
            brings, are the budget's to say.

    Raises:
        RequestError: saying which.
    """
    for name, value in settings.items():
        if name not in _HEEDED and (name not in _GREEDY or value not in _GREEDY[name]):
            raise RequestError(
                f"{name}: within a budget of computed tokens a text is generated greedily, without such a setting, got "
                f"{value!r}"
            )


def _shown(texts: Any, which: int) -> str:
    if texts is None:
        return ""
    text = texts[which]
    cut = text if len(text) <= _SHOWN else (f"{text[:_SHOWN]}…" if which else f"…{text[-_SHOWN:]}")
    return f" {cut!r}"


def name_cache(hook: Any, identity: Callable[[], str]) -> None:
    """Keep the answers of a cache of the harness apart by what they depend on, each kind in a table of its own.

    The harness keys an answer by the request alone: a cache that the plain model filled would answer for the
    re-balanced one.

    Args:
        hook: the harness' ``CacheHook``.
        identity: gives what answers depend on, as text; called only where there is a cache.

    Raises:
        RuntimeError: the cache is of a kind that has no tables.
    """
    cache = getattr(hook, "dbdict", None)
    if cache is None:
        return
    if not hasattr(cache, "tablename") or not hasattr(cache, "conn"):
        raise RuntimeError("use_cache: this harness' cache cannot keep answers of several models apart: leave it out")
    digest = hashlib.sha256(identity().encode()).hexdigest()[:16]
    cache.commit()
    cache.tablename = f"attnrb_{digest}"
    cache.conn.execute(f'CREATE TABLE IF NOT EXISTS "{cache.tablename}" (key TEXT PRIMARY KEY, value BLOB)')
    cache.conn.commit()
