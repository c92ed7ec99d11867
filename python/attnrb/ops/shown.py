"""How values that hold tensors show themselves: by dtypes and shapes, where numbers would fill a screen."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["shown_fields"]


def shown_fields(value: object, names: Iterable[str]) -> str:
    """A short ``repr``: the type's name, and of these attributes each that is not None."""
    parts = ((name, getattr(value, name)) for name in names)
    return f"{type(value).__name__}({', '.join(f'{name}={_shown(each)}' for name, each in parts if each is not None)})"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{place}"
    return reprlib.repr(value) if isinstance(value, (list, tuple)) and type(value) in (list, tuple) else repr(value)
