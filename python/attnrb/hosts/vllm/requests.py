"""Marked prompts as an engine takes them: tokens, and the options of attnrb that say which of them matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnrb.hosts.vllm.asked import KEY, digest
from attnrb.policies.base import Policy
from attnrb.text.marked import Marked, batch_rows

__all__ = ["MarkedRequest", "requests_of"]


@dataclass(frozen=True)
class MarkedRequest:
    """One prompt and what is asked for with it.

        llm.generate(request.prompt, SamplingParams(max_tokens=32, extra_args=request.extra_args))

    Attributes:
        tokens: of the prompt.
        options: of attnrb, JSON-ready.
    """

    tokens: list[int]
    options: dict[str, Any]

    @property
    def prompt(self) -> dict[str, list[int]]:
        """What vLLM calls a ``TokensPrompt``."""
        return {"prompt_token_ids": self.tokens}

    @property
    def extra_args(self) -> dict[str, Any]:
        """For ``SamplingParams``."""
        return {KEY: self.options}


def requests_of(
    marked: Marked, policy: Policy | Mapping[str, Any] | None = None, **options: Any
) -> list[MarkedRequest]:
    """The rows of a marked batch as requests of an engine.

        marked = attnrb.mark(llm.get_tokenizer(), ["((Currently, the capital is B.)) The capital is"])
        requests = attnrb.hosts.vllm.requests_of(marked, strength=8)
        params = [SamplingParams(max_tokens=32, extra_args=each.extra_args) for each in requests]
        llm.generate([each.prompt for each in requests], params)

    Args:
        marked: of `attnrb.mark`, `attnrb.spans` or `attnrb.find_spans`' batch; its padding is left out.
        policy: of these requests, as it is or as `attnrb.Policy.to_dict` gives it. Default: the engine's.
        options: of the engine's policy, in place of its own: ``strength=8``.

    Returns:
        One for each row.

    Raises:
        TypeError: ``marked`` is no `attnrb.Marked`, or ``options`` stand beside a policy.
    """
    if not isinstance(marked, Marked):
        raise TypeError(f"marked: expected what attnrb.mark returns, got {type(marked).__name__}")
    if policy is not None and options:
        raise TypeError(f"policy: expected it alone, or options of the engine's policy, got {', '.join(options)} too")
    asked = dict(policy.to_dict() if isinstance(policy, Policy) else policy or options)
    found = []
    for row, spans in zip(batch_rows(marked.inputs), marked.spans, strict=True):
        mine = dict(asked)
        if spans:
            mine["spans"] = [
                [span.start - row.first, span.end - row.first] + ([] if span.strength is None else [span.strength])
                for span in spans
            ]
            mine["tokens"] = digest(row.ids)
        found.append(MarkedRequest(row.ids, mine))
    return found
