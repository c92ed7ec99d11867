"""Which request the calls of a model belong to: what a user said of their texts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from attnrb.policies.base import LayerPlan, Request

__all__ = ["Requests"]


class Requests:
    """The requests of one patch: in each thread the one that is being served."""

    def __init__(self) -> None:
        self._own: ContextVar[Request | None] = ContextVar("attnrb_request", default=None)
        # torch.compile cannot see context variables: a traced forward takes the one that was set last.
        self._latest: Request | None = None
        self._warned = False

    @contextmanager
    def set(self, request: Request) -> Iterator[None]:
        """Serve this request in this thread until the block ends; one within another stands in its place."""
        token, before = self._own.set(request), self._latest
        self._latest = request
        try:
            yield
        finally:
            self._own.reset(token)
            self._latest = before

    def current(self, plan: LayerPlan) -> Request | None:
        """The request of this thread; a plan that wants spans and has none is warned of once."""
        if torch.compiler.is_compiling():
            return self._latest
        request = self._own.get()
        if plan.wants_spans and not self._warned and (request is None or not request.spans):
            self._warned = True
            warnings.warn(
                "this policy edits spans of the prompt, and a call came without any, so it ran as the model does by "
                "itself: use patched.generate(marked), or patched.spans(marked.spans) around the call",
                stacklevel=6,
            )
        return request
