"""What answers the questions of a study: the model itself, or vLLM with the same weights.

Note: [Scores by vLLM]
vLLM gives the log-probabilities of a prompt's tokens. So an answer is scored as the end of a prompt, read whole for
each answer. A policy that goes by where the prompt ends (`rows` ``"last"``, or `outside`) would take the answer for a
part of it, and is not served here. Everything that needs gradients, such as a ranking of heads, is the model's own
matter, which is loaded beside the engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch

from attnrb.hosts.transformers.patch import patch
from attnrb.policies.base import Policy, policy_names
from attnrb.policies.emphasis import Emphasis
from attnrb.studies.adapters import Adapter, adapted
from attnrb.studies.answers import AnswerRow, log_likelihoods
from attnrb.studies.candidates import candidate_batches, candidate_scores
from attnrb.studies.writing import end_ids, think, until_end, write
from attnrb.text.decoding import decode
from attnrb.text.marked import Marked, batch_rows
from attnrb.text.spans import Span

__all__ = ["Engine", "ModelEngine", "VllmEngine"]

_BATCH_TOKENS = 2048
_BATCH_LOGITS = 2**26  # of answers: 256 MiB in float32


class Engine(Protocol):
    """What answers."""

    def serves(self, policy: Policy | None) -> bool:
        """Whether it can answer under this policy."""

    def scores(
        self, prompts: Sequence[Sequence[AnswerRow]], policy: Policy | None, adapter: Adapter | None = None
    ) -> list[list[float]]:
        """The log-likelihood of each answer to each prompt, in nats; answers to one prompt share its tokens."""

    def sums(self, rows: Sequence[AnswerRow], policy: Policy | None) -> list[float]:
        """The log-likelihood of the answer in each row, in nats; answers may be long."""

    def written(self, prompts: Sequence[Marked], tokens: int, policy: Policy | None) -> list[tuple[str, int]]:
        """What is written behind each prompt, greedily, and how many tokens that has."""

    def thought(
        self, prompts: Sequence[Marked], budget: int, tokens: int, policy: Policy | None
    ) -> list[tuple[str, int]]:
        """The answer to each prompt behind ``budget`` computed tokens, and their number."""


class ModelEngine:
    """The model itself, patched for each call.

    Args:
        model: an unpatched ``transformers`` causal language model in evaluation mode.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def serves(self, policy: Policy | None) -> bool:
        """Any policy."""
        return True

    def scores(
        self, prompts: Sequence[Sequence[AnswerRow]], policy: Policy | None, adapter: Adapter | None = None
    ) -> list[list[float]]:
        """See `Engine.scores`."""
        found: dict[int, list[float]] = {}
        answer_tokens = _BATCH_LOGITS // int(self.model.config.get_text_config().vocab_size)
        with adapted(self.model, adapter), self._edited(policy) as patched:
            for batch in candidate_batches(prompts, _BATCH_TOKENS, answer_tokens):
                mine = candidate_scores(self.model, [prompts[index] for index in batch], patched)
                found |= dict(zip(batch, mine, strict=True))
        return [found[index] for index in range(len(prompts))]

    def sums(self, rows: Sequence[AnswerRow], policy: Policy | None) -> list[float]:
        """See `Engine.sums`."""
        with torch.inference_mode(), self._edited(policy) as patched:
            return [float(each.sum()) for each in log_likelihoods(self.model, rows, patched)]

    def written(self, prompts: Sequence[Marked], tokens: int, policy: Policy | None) -> list[tuple[str, int]]:
        """See `Engine.written`."""
        with self._edited(policy) as patched:
            return write(self.model, self.tokenizer, prompts, tokens, patched)

    def thought(
        self, prompts: Sequence[Marked], budget: int, tokens: int, policy: Policy | None
    ) -> list[tuple[str, int]]:
        """See `Engine.thought`."""
        with self._edited(policy) as patched:
            return think(self.model, self.tokenizer, prompts, budget, tokens, patched)

    def _edited(self, policy: Policy | None) -> Any:
        return nullcontext() if policy is None else patch(self.model, policy)


class VllmEngine:
    """vLLM: see Note: [Scores by vLLM].

    Args:
        llm: what `attnrb.hosts.vllm.offline.offline_engine` returned.
        model: whose weights it has.
        tokenizer: its tokenizer.
    """

    def __init__(self, llm: Any, model: Any, tokenizer: Any) -> None:
        self.llm, self.tokenizer = llm, tokenizer
        self.ends = end_ids(model, tokenizer)

    def serves(self, policy: Policy | None) -> bool:
        """Registered policies that do not go by where a prompt ends."""
        if policy is None:
            return True
        if isinstance(policy, Emphasis) and (policy.rows == "last" or policy.outside is not None):
            return False
        return getattr(policy, "name", "") in policy_names()

    def scores(
        self, prompts: Sequence[Sequence[AnswerRow]], policy: Policy | None, adapter: Adapter | None = None
    ) -> list[list[float]]:
        """See `Engine.scores`.

        Raises:
            NotImplementedError: there is an adapter.
        """
        if adapter is not None:
            raise NotImplementedError("engine: vllm has the model's own weights: take --engine transformers for LoRA")
        found = iter(self.sums([row for rows in prompts for row in rows], policy))
        return [[next(found) for _ in rows] for rows in prompts]

    def sums(self, rows: Sequence[AnswerRow], policy: Policy | None) -> list[float]:
        """See `Engine.sums`.

        Raises:
            ValueError: the model's logits are not finite.
        """
        params = [self._params(policy, row.spans, max_tokens=1, prompt_logprobs=0) for row in rows]
        texts = [[*row.prompt, *row.answer] for row in rows]
        said = self.llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
        found = []
        for row, text, one in zip(rows, texts, said, strict=True):
            places = range(len(row.prompt), len(text))
            found.append(float(sum(one.prompt_logprobs[place][text[place]].logprob for place in places)))
            if not math.isfinite(found[-1]):
                raise ValueError("model: its logits are not finite; try dtype=float32 (--dtype float32)")
        return found

    def written(self, prompts: Sequence[Marked], tokens: int, policy: Policy | None) -> list[tuple[str, int]]:
        """See `Engine.written`."""
        rows = [batch_rows(prompt.inputs)[0] for prompt in prompts]
        spans = [prompt.spans.shift(-row.first)[0] for prompt, row in zip(prompts, rows, strict=True)]
        params = [self._params(policy, each, max_tokens=tokens) for each in spans]
        said = self.llm.generate([{"prompt_token_ids": row.ids} for row in rows], params, use_tqdm=False)
        kept = [until_end(list(one.outputs[0].token_ids), self.ends) for one in said]
        return [(decode(self.tokenizer, ids), len(ids)) for ids in kept]

    def thought(
        self, prompts: Sequence[Marked], budget: int, tokens: int, policy: Policy | None
    ) -> list[tuple[str, int]]:
        """Refused.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("engine: vllm keeps no budget of computed tokens: take --engine transformers")

    def _params(self, policy: Policy | None, spans: Sequence[Span], **options: Any) -> Any:
        from vllm import SamplingParams

        from attnrb.hosts.vllm.asked import KEY, OFF

        asked: Any = OFF
        if policy is not None:
            asked = policy.to_dict()
            if isinstance(policy, Emphasis) and spans:
                asked["spans"] = [[span.start, span.end] for span in spans]
        return SamplingParams(temperature=0, detokenize=False, extra_args={KEY: asked}, **options)
