"""A prompt as a person writes it, perhaps with markup, and the policy that goes with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch

from attnrb.hosts.transformers.patch import Patch, patch
from attnrb.policies import Emphasis, Policy, Rebalance
from attnrb.policies.base import model_shape
from attnrb.protocols import LoadedTokenizer, Model
from attnrb.studies.generation import encode
from attnrb.text.mark import mark
from attnrb.text.markup import MarkupError, parse_markup
from attnrb.text.reading import check_text
from attnrb.text.spans import Spans

__all__ = ["Prompt", "read_prompt"]


class Prompt(NamedTuple):
    """A prompt that is ready for a model."""

    input_ids: torch.Tensor
    """int64 ``[1, n]``"""
    spans: Spans | None
    """Of the one row; None where nothing is marked."""
    policy: Policy

    @contextmanager
    def patch(self, model: Model) -> Iterator[Patch]:
        """Edit the model by the policy, with these spans, until the block ends."""
        with patch(model, self.policy) as patched:
            marked = nullcontext() if self.spans is None else patched.spans(self.spans, prompt=self.input_ids.shape[1])
            with marked:
                yield patched


def read_prompt(
    model: Model,
    tokenizer: LoadedTokenizer,
    prompt: str,
    policy: Policy | None = None,
    *,
    chat: bool | None = None,
    markup: bool = True,
) -> Prompt:
    """Tokenise a prompt, read its markup if there is a policy that heeds it, and choose the policy if there is none.

    Without a policy, a prompt with markup gets ``Emphasis()`` and any other ``Rebalance()``. A policy that heeds no
    spans, such as re-balancing, takes the prompt literally.

    Args:
        model: whose shape says whether the policy heeds spans.
        tokenizer: of the model.
        prompt: the text.
        policy: what is edited; None: as above.
        chat: as `attnrb.studies.generation.encode`.
        markup: False takes the text literally.

    Raises:
        ValueError: as `encode`; the markup cannot be read; or the policy heeds spans and nothing is marked.
    """
    heeded = policy is None or policy.resolve(model_shape(model)).wants_spans
    check_text("prompt", prompt)
    marked = markup and heeded and _is_marked(prompt)
    if policy is not None and heeded and not marked:
        how = "mark what matters as ((this))" if markup else "--no-markup takes the prompt literally"
        raise ValueError(f"prompt: {policy.name} is for marked parts of a prompt, and nothing is marked; {how}")
    if not marked:
        return Prompt(encode(tokenizer, prompt, chat=chat), None, Rebalance() if policy is None else policy)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        encode(tokenizer, "", chat=chat)  # says what is wrong
    as_chat = has_template and chat is not False
    found = mark(tokenizer, [{"role": "user", "content": prompt}] if as_chat else prompt)
    return Prompt(found.inputs["input_ids"], found.spans, Emphasis() if policy is None else policy)


def _is_marked(prompt: str) -> bool:
    try:
        return bool(parse_markup(prompt, name="prompt")[1])
    except MarkupError as error:
        raise ValueError(f"{error}; or take the prompt literally (--no-markup)") from error
