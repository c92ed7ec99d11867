"""What changes a loaded model's weights: PEFT adapters, and differences that are added to it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from attnrb.models.checkpoint import Checkpoint, ModelError, failures, listed, read_model

_WEIGHTS = "adapter_model.safetensors"


def add_adapter(model: Any, tokenizer: Any, adapter: str, *, revision: str | None, allow_missing: bool) -> Any:
    """The model with a PEFT adapter on it, as lm-evaluation-harness' ``hf`` has it.

    Where the tokenizer has another number of tokens than the model, the embedding is resized first: adapters bring the
    rows of the tokens that they add.

    Args:
        model: a ``PreTrainedModel``.
        tokenizer: its tokenizer.
        adapter: a folder, or an id of the Hugging Face hub, with weights in safetensors.
        revision: branch, tag or commit on the hub.
        allow_missing: let weights that the adapter lacks be random.

    Raises:
        ModelError: there is no such adapter, it is pickled or of another model, or the package peft is missing.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError("peft: an adapter needs the package peft: run `pip install 'attnrb[train]'`")
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    with failures(f"peft: the adapter {adapter!r} could not be loaded"):
        with safe_open(_weights(adapter, revision), framework="pt") as file:
            found = set(file.keys())
        rows = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows and not allow_missing and not any("embed" in name for name in found):
            raise ModelError(
                f"peft: the tokenizer has {len(tokenizer):,} tokens, the model {rows:,}, and the adapter {adapter!r} "
                "brings no embedding for the others: name the tokenizer that belongs to the model"
            )
        if model.config.get_text_config().vocab_size != len(tokenizer):
            model.resize_token_embeddings(len(tokenizer))
        hub: dict[str, Any] = {"revision": revision} if revision else {}
        adapted = PeftModel.from_pretrained(model, adapter, **hub)
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if wanted - found and not allow_missing:
        raise ModelError(f"peft: the adapter {adapter!r} lacks the weights {listed(sorted(wanted - found))}")
    if stray := sorted(name for name in found - wanted if "lora_" in name):
        raise ModelError(f"peft: the adapter {adapter!r} is of another model, which has {listed(stray)}")
    return adapted


def _weights(adapter: str, revision: str | None) -> str:
    if Path(adapter).is_dir():
        file = Path(adapter) / _WEIGHTS
        if not file.is_file():
            raise ModelError(
                f"peft: there is no {_WEIGHTS} in {adapter!r}: pickled adapters are never loaded, convert them"
            )
        return str(file)
    from huggingface_hub import hf_hub_download

    return hf_hub_download(adapter, _WEIGHTS, revision=revision)


def add_delta(model: Any, delta: str, checkpoint: Checkpoint) -> None:
    """Add the weights of another checkpoint, as lm-evaluation-harness' ``hf`` does with ``delta``.

    Raises:
        ModelError: there is no such checkpoint, or it has not just the same weights.
    """
    try:
        difference = read_model(replace(checkpoint, place=delta, name=delta, gguf_file=None, subfolder=""), model.dtype)
    except ModelError as error:
        raise ModelError(f"delta: {str(error).removeprefix('model: ')}") from error
    ours, theirs = model.state_dict(), difference.state_dict()
    odd = sorted(name for name in ours if name not in theirs or ours[name].shape != theirs[name].shape)
    if odd:
        raise ModelError(f"delta: {delta!r} has no weights of the same shape for {listed(odd)}")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight += theirs[name].to(weight.device)
