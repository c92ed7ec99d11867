"""What attnrb needs of a model and of a tokenizer, for type checkers and editors.

Nothing here is imported from transformers: its models and tokenizers fit, and so does whatever wraps them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

__all__ = ["LanguageModel", "LoadedTokenizer", "Model", "Tokenizer"]


class Model(Protocol):
    """A module that is, or holds, a model of transformers: what `attnrb.patch` takes.

    Any ``torch.nn.Module`` passes a type checker; a pipeline, a name or a pair of model and tokenizer does not.
    """

    training: bool

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]: ...

    def modules(self) -> Iterator[torch.nn.Module]: ...


class Tokenizer(Protocol):
    """A tokenizer of transformers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def decode(self, *args: Any, **kwargs: Any) -> Any: ...


class LanguageModel(Model, Protocol):
    """A causal language model as `attnrb.models.load` returns it: a ``transformers.PreTrainedModel``, or around one.

    What is used most is named here, so that an editor can offer it; every other attribute is one of transformers' own.
    """

    config: Any
    generation_config: Any

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    def eval(self) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any: ...

    def __getattr__(self, name: str) -> Any: ...


class LoadedTokenizer(Tokenizer, Protocol):
    """A tokenizer as `attnrb.models.load` returns it: a ``transformers.PreTrainedTokenizerBase``."""

    chat_template: Any
    eos_token_id: Any
    pad_token_id: Any
    padding_side: Any

    def __len__(self) -> int: ...

    def encode(self, *args: Any, **kwargs: Any) -> Any: ...

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any: ...

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any: ...

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any: ...

    def __getattr__(self, name: str) -> Any: ...
