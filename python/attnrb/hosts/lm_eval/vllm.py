"""The harness' requests answered by vLLM: `AttnrbLM` with an engine in place of the model's own forward."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from lm_eval.api.registry import register_model

from attnrb.hosts.lm_eval.model import AttnrbLM
from attnrb.hosts.lm_eval.requests import check_requests, name_cache
from attnrb.hosts.vllm.asked import KEY, OFF
from attnrb.hosts.vllm.offline import check_installed, offline_engine
from attnrb.policies import Policy

__all__ = ["VllmLM"]

_NOT_THERE = ("mixed_precision_dtype", "parallelize", "peft", "softmax_dtype")
"""Options of `AttnrbLM` that vLLM, which reads the model by itself, would not heed."""


@register_model("attnrb-vllm")
class VllmLM(AttnrbLM):
    """A model of lm-evaluation-harness whose choices are scored by vLLM, under the same policies.

    Log-probabilities are those of `AttnrbLM` within rounding. It scores choices; it writes no text.

    Args:
        pretrained: as `AttnrbLM` has it. The model is loaded for its tokenizer and its digest too, on the CPU.
        engine: options of ``vllm.LLM``, in place of those that are usual here.
        options: as `AttnrbLM` has them.

    Raises:
        ImportError: there is no vLLM.
        ValueError: an option is one that vLLM does not heed.
    """

    def __init__(self, pretrained: Any = None, *, engine: dict[str, Any] | None = None, **options: Any) -> None:
        for name in _NOT_THERE:
            if options.get(name):
                raise ValueError(f"{name}: vLLM scores the choices of attnrb-vllm, and takes no such option")
        check_installed()
        options["plain"] = True  # of the model that is loaded beside the engine
        super().__init__(pretrained, **options)
        self.engine = offline_engine(self.model, self.tokenizer, self.max_length, engine)

    @contextlib.contextmanager
    def rebalanced(self, config: Policy | None) -> Iterator[None]:
        """Within it, requests have the policy ``config``; None leaves them plain."""
        before, self._policy = self._policy, config
        name_cache(self.cache_hook, self._identity)
        try:
            yield
        finally:
            self._policy = before
            name_cache(self.cache_hook, self._identity)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is what greedy search would write."""
        from vllm import SamplingParams

        check_requests(requests, self.max_length)
        asked = OFF if self._policy is None else self._policy.to_dict()
        params = SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False, extra_args={KEY: asked}
        )
        # One token is asked for beside those of the prompt.
        texts = [(context + rest)[-(self.max_length - 1) :] for _, context, rest in requests]
        said = self.engine.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=not disable_tqdm)
        found = []
        for (key, _, rest), text, one in zip(requests, texts, said, strict=True):
            places = range(len(text) - len(rest), len(text))
            scored = [one.prompt_logprobs[place][text[place]] for place in places]
            answer = (float(sum(each.logprob for each in scored)), all(each.rank == 1 for each in scored))
            if not math.isfinite(answer[0]):
                raise ValueError("model: its logits are not finite; try dtype=float32 (--dtype float32)")
            found.append(answer)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> NoReturn:
        """Refused."""
        raise NotImplementedError("engine: vllm scores choices and writes no text; take --engine transformers")

    def compute(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        raise NotImplementedError("engine: vllm scores choices and writes no text; take --engine transformers")
