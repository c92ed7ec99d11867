"""Text decoders inside models that also see: patched like any other, images included."""

from __future__ import annotations

from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from dense_oracle import DenseOracle, linear_gains
from every_model import tiny_model
from test_patch_models import CONFIG, assert_close
from tiny_models import tiny, tokens

MODELS = ["gemma3", "llava", "qwen2_5_vl", "qwen3_vl", "mistral3", "idefics3", "internvl"]


def seeing(name: str) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        return tiny_model(name, AutoModelForImageTextToText)
    except (KeyError, ValueError):
        pytest.skip(f"this version of transformers has no {name}, or one of another make")


@torch.no_grad()
def as_the_oracle_says(model: Any, ids: torch.Tensor, **inputs: Any) -> None:
    decoder = model.get_decoder()
    layers = decoder.config.num_hidden_layers
    with DenseOracle(linear_gains(layers, CONFIG.alpha), threshold=CONFIG.threshold).attached(decoder):
        expected = model(input_ids=ids, **inputs).logits
    plain = model(input_ids=ids, **inputs).logits
    with attnrb.patch(model, CONFIG) as patched:
        assert_close(model(input_ids=ids, **inputs).logits, expected)
    assert patched.stats.layers == layers - 2
    assert_close(model(input_ids=ids, **inputs).logits, plain)
    assert (expected - plain).abs().max() > 1e-2 * expected.abs().max(), "this case would not notice"


@pytest.mark.parametrize("name", MODELS)
def test_text_alone(name: str) -> None:
    as_the_oracle_says(seeing(name), tokens(2, 16))


def test_text_with_an_image() -> None:
    """The tokens of an image see each other both ways, a pattern that no numbers say."""
    model = seeing("gemma3")
    config = model.config
    count = config.mm_tokens_per_image
    ids = tokens(1, count + 12)
    ids[0, 4 : 4 + count] = config.image_token_id
    size = config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    kinds = (ids == config.image_token_id).long()
    as_the_oracle_says(model, ids, pixel_values=pixels, token_type_ids=kinds)


@pytest.mark.parametrize("name", ["llama", "llama4_text"])
def test_the_decoder_of_a_model_with_a_head_is_the_part_below_it(name: str) -> None:
    """Also where the model does not say so itself."""
    model, ids = tiny(name), tokens(1, 6)
    with torch.no_grad(), attnrb.patch(model) as patched:
        assert patched.decoder is model.model
        hidden = model.model(ids).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(ids).logits)
