"""Generate text from one prompt and time it: what the command line shows, usable from Python."""

from __future__ import annotations

import reprlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnrb.protocols import LanguageModel, LoadedTokenizer, Tokenizer
from attnrb.text.chat import template_errors
from attnrb.text.reading import check_text
from attnrb.text.vocabulary import check_token_ids

_LEAST_TEMPERATURE = 1e-6
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes half a character to


@dataclass(frozen=True, repr=False)
class Generation:
    """New tokens of one prompt, with the time they took."""

    token_ids: tuple[int, ...]
    """The new tokens, without the token that ended the text."""
    text: str
    """`token_ids` as text."""
    ended: bool
    """True when the model ended the text, False when it reached the limit."""
    first_token_seconds: float
    """Time from the start to the first new token: the prompt's forward."""
    tokens_per_second: float | None
    """Speed of the tokens after the first; None when there are none."""

    def __repr__(self) -> str:
        end = "ended" if self.ended else "cut"
        return f"Generation({reprlib.repr(self.text)}, {len(self.token_ids)} tokens, {end})"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary of every field, and `tokens`, their number."""
        return {
            "text": self.text,
            "tokens": len(self.token_ids),
            "token_ids": list(self.token_ids),
            "ended": self.ended,
            "first_token_seconds": self.first_token_seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def encode(tokenizer: LoadedTokenizer, prompt: str, *, chat: bool | None = None) -> torch.Tensor:
    """Token ids of a prompt, int64 ``[1, n]``.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: the text.
        chat: wrap the prompt as a user's message in the tokenizer's chat template. Default: if it has one.

    Raises:
        ValueError: when `chat` is True and there is no chat template, or when the prompt holds no token or what is no
            character, or the template fails.
    """
    check_text("prompt", prompt)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ValueError("chat: this tokenizer has no chat template; use the prompt as it is (--no-chat)")
    if has_template and chat is not False:
        message = [{"role": "user", "content": prompt}]
        with template_errors():
            ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError("prompt: expected some text, got none")
    return torch.tensor([ids], dtype=torch.int64, device="cpu")


def generate(
    model: LanguageModel,
    tokenizer: LoadedTokenizer,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Generate from one prompt with a model that is patched or not.

    Args:
        model: a ``transformers`` causal language model.
        tokenizer: its tokenizer.
        input_ids: int64 ``[1, n]``, as `encode` returns.
        max_new_tokens: how many new tokens at most. Default: 64.
        temperature: 0 (default) takes the likeliest token each time; above 0 samples.
        seed: of the sampling. Default: 0. Two runs with one seed draw the same random numbers.
        on_text: called with each new piece of text as soon as its characters are whole.

    Raises:
        ValueError: when `max_new_tokens` is below 1, `temperature` is negative or so small that logits divided by it
            overflow (below 1e-6), `seed` has more than 64 bits, prompt and new tokens exceed the model's context, the
            prompt has a token that the model does not know, or its logits are not finite.

    The model's own settings count (penalties, stop strings, a kind of cache), except those that ask for several texts
    at once or for beams, or that need code from the hub: one text is generated, token by token. A warning says which
    were left out.
    """
    from attnrb.hosts.transformers.logits import ONE_TEXT, RefuseNaN

    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if temperature != 0.0 and not _LEAST_TEMPERATURE <= temperature < float("inf"):
        raise ValueError(f"temperature: expected 0, or a number of at least {_LEAST_TEMPERATURE:g}, got {temperature}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
    prompt_tokens = input_ids.shape[1]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and prompt_tokens + max_new_tokens > context:
        raise ValueError(
            f"max_new_tokens: {prompt_tokens} tokens of prompt and {max_new_tokens} new ones exceed "
            f"the model's context of {context}"
        )

    check_token_ids(model, input_ids.flatten().tolist())
    ends = _end_ids(model)
    _warn_of_settings(model)
    pieces = _TextPieces(tokenizer, on_text, ends)
    # Sampling filters left from a model's own settings make transformers warn under greedy search, so they are cleared.
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    torch.manual_seed(seed)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            input_ids.to(model.device),
            attention_mask=torch.ones_like(input_ids, device=model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=ends[0] if ends else 0,
            streamer=pieces,
            logits_processor=[RefuseNaN()],
            tokenizer=tokenizer,  # which stop strings need
            **ONE_TEXT,
            **sampling,
        )
    new = output[0, prompt_tokens:].tolist()
    ended = bool(new) and new[-1] in ends
    times = pieces.times
    ids = tuple(new[:-1] if ended else new)
    return Generation(
        token_ids=ids,
        text=decode(tokenizer, ids),
        ended=ended,
        first_token_seconds=times[0] - start,
        tokens_per_second=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
    )


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of token ids, as the model wrote it: special tokens included, spaces untouched."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _warn_of_settings(model: Any) -> None:
    from attnrb.hosts.transformers.logits import FOREIGN

    names = ("num_beams", "num_return_sequences", *FOREIGN)
    own = {name: getattr(model.generation_config, name, None) for name in names}
    left_out = [f"{name}={value}" for name, value in own.items() if value not in (None, 0, 1)]
    if left_out:
        warnings.warn(
            f"the model's own settings {' and '.join(left_out)} are left out: one text is generated, token by token",
            stacklevel=1,
        )


def _end_ids(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    if end is None:
        return []
    return [int(token) for token in end] if isinstance(end, (list, tuple)) else [int(end)]


class _TextPieces:
    """A transformers streamer: notes when each new token came and hands on its text.

    A token may be half a character, so text is decoded from the last whole piece on and held back while it ends in a
    replacement character.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None, ends: Sequence[int]) -> None:
        self.times: list[float] = []
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ends = ends
        self._ids: list[int] = []
        self._shown = 0  # tokens whose text was handed on
        self._anchor = 0  # decoding starts here, a piece earlier, since some tokenizers drop the first token's space
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # generate hands over the prompt first
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        if self._on_text is None:
            return
        self._ids += [token for token in value.flatten().tolist() if token not in self._ends]
        self._hand_on(whole=False)

    def end(self) -> None:
        if self._on_text is not None:
            self._hand_on(whole=True)

    def _hand_on(self, whole: bool) -> None:
        known = decode(self._tokenizer, self._ids[self._anchor : self._shown])
        text = decode(self._tokenizer, self._ids[self._anchor :])
        if len(text) <= len(known) or (text.endswith(_UNFINISHED) and not whole):
            return
        self._anchor, self._shown = self._shown, len(self._ids)
        if self._on_text is not None:
            self._on_text(text[len(known) :])
