"""Small additions to a model's weights: LoRA on the projection behind attention, for all heads or for some.

Note: [LoRA of some heads]
The projection behind attention, o_proj, reads head h of width D in its columns hD to (h+1)D. LoRA adds B A to its
weights, with A of ``rank`` rows. Columns of A that are 0 and get no gradient leave the columns of these heads as they
are, whatever B becomes. So an adapter of some heads is one whose A is masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from attnrb.policies.base import model_shape
from attnrb.policies.profile import heads_by_layer, read_heads

__all__ = ["Adapter", "adapted", "mask_heads", "output_projections"]

_PROJECTION = "o_proj"


def output_projections(model: Any) -> dict[int, torch.nn.Linear]:
    """The projections behind attention, by layer.

    Raises:
        ValueError: the model has none of this name.
    """
    found = {}
    for name, module in model.named_modules():
        *path, last = name.split(".")
        numbers = [part for part in path if part.isdecimal()]
        if last == _PROJECTION and numbers and hasattr(module, "in_features"):
            found[int(numbers[0])] = module
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no {_PROJECTION} behind its attention, so LoRA has no place"
        )
    return found


class Adapter(torch.nn.Module):
    """LoRA on the projections behind attention; it starts as no change.

    Args:
        model: a ``transformers`` decoder.
        rank: of what is added to each projection.
        heads: which heads' columns may change, as a policy takes them: a choice, or a `attnrb.HeadProfile`. None: all.
        seed: of A. B starts at 0.

    Attributes:
        down: A of each layer, float32 ``[rank, H D]``.
        up: B of each layer, float32 ``[width, rank]``.
        mask: which columns of A count, bool ``[H D]`` of each layer.
    """

    def __init__(self, model: Any, rank: int = 1, heads: Any = None, seed: int = 0) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank: expected at least 1, got {rank}")
        shape = model_shape(model)
        chosen = heads_by_layer(read_heads(heads), None, shape)
        draw = torch.Generator().manual_seed(seed)
        self.rank = rank
        self.down, self.up = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        self.mask: dict[int, torch.Tensor] = {}
        for layer, projection in output_projections(model).items():
            if layer not in chosen:
                continue
            width = projection.in_features // shape.heads
            mask = torch.zeros(shape.heads, dtype=torch.bool, device="cpu")
            mask[list(chosen[layer])] = True
            self.mask[layer] = mask.repeat_interleave(width)
            start = torch.randn(rank, projection.in_features, generator=draw, dtype=torch.float32, device="cpu")
            start = start / projection.in_features**0.5
            self.down[str(layer)] = torch.nn.Parameter(start * self.mask[layer])
            self.up[str(layer)] = torch.nn.Parameter(
                torch.zeros(projection.out_features, rank, dtype=torch.float32, device="cpu")
            )

    def addition(self, layer: int, inputs: torch.Tensor) -> torch.Tensor:
        """What is added to the projection's output ``[..., width]`` for its inputs ``[..., H D]``."""
        down = self.down[str(layer)] * self.mask[layer]
        added: torch.Tensor = (inputs @ down.to(inputs).mT) @ self.up[str(layer)].to(inputs).mT
        return added

    def to_dict(self) -> dict[str, Any]:
        """Every number, JSON-ready."""
        return {
            "rank": self.rank,
            "mask": {str(layer): mask.tolist() for layer, mask in self.mask.items()},
            **{
                name: {layer: [[round(each, 7) for each in row] for row in matrix.tolist()] for layer, matrix in values}
                for name, values in (("down", self.down.items()), ("up", self.up.items()))
            },
        }

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Adapter:
        """What `to_dict` described."""
        adapter = cls.__new__(cls)
        torch.nn.Module.__init__(adapter)
        adapter.rank = options["rank"]
        adapter.mask = {
            int(layer): torch.tensor(mask, dtype=torch.bool, device="cpu") for layer, mask in options["mask"].items()
        }
        for name in ("down", "up"):
            matrices = {
                layer: torch.tensor(rows, dtype=torch.float32, device="cpu") for layer, rows in options[name].items()
            }
            setattr(adapter, name, torch.nn.ParameterDict(matrices))
        return adapter.requires_grad_(False)


@contextmanager
def adapted(model: Any, adapter: Adapter | None) -> Iterator[None]:
    """Within it the model has the adapter; None: it is as it is."""
    hooks = []
    if adapter is not None:
        for layer, projection in output_projections(model).items():
            if layer in adapter.mask:
                hooks.append(projection.register_forward_hook(_adding(adapter, layer)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adding(adapter: Adapter, layer: int) -> Any:
    def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + adapter.addition(layer, inputs[0])

    return add


def mask_heads(peft_model: Any, heads: Any) -> int:
    """Let PEFT's LoRA on ``o_proj`` change some heads' columns alone: see Note: [LoRA of some heads].

        model = get_peft_model(model, LoraConfig(r=8, target_modules=["o_proj"]))
        attnrb.studies.adapters.mask_heads(model, profile)

    Columns of A that belong to other heads are set to 0, and their gradients are. An optimizer with weight decay leaves
    them at 0 too.

    Args:
        peft_model: what ``get_peft_model`` returned.
        heads: a choice of heads as a policy takes it, or a `attnrb.HeadProfile`.

    Returns:
        How many columns may change.

    Raises:
        ValueError: the model has no LoRA on ``o_proj``, or the heads are of another model.
    """
    model = peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model
    shape = model_shape(model)
    chosen = heads_by_layer(read_heads(heads), None, shape)
    changing = 0
    projections = {layer: module for layer, module in output_projections(model).items() if hasattr(module, "lora_A")}
    if not projections:
        raise ValueError(f"peft_model: expected LoRA with target_modules=[{_PROJECTION!r}], got none there")
    for layer, module in projections.items():
        mask = torch.zeros(shape.heads, dtype=torch.bool, device="cpu")
        mask[list(chosen.get(layer, ()))] = True
        columns = mask.repeat_interleave(module.in_features // shape.heads)
        changing += int(columns.sum())
        adapters: Any = module.lora_A
        for each in adapters.values():
            mine = columns.to(each.weight.device)
            with torch.no_grad():
                each.weight *= mine
            each.weight.register_hook(lambda gradient, mine=mine: gradient * mine)
    return changing
