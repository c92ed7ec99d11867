"""How models are run: batches, beams, sampling, caches, conversations, the base model alone."""

from __future__ import annotations

from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from dense_oracle import DenseOracle, linear_gains
from tiny_models import LAYERS, tiny, tokens

pytestmark = pytest.mark.oldest

ALPHA, THRESHOLD = 0.5, 0.05
CONFIG = attnrb.RebalanceConfig(alpha=ALPHA, threshold=THRESHOLD)

# Plain, windowed throughout, windows and full layers mixed with either kind as the source.
some_architectures = pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt_oss"])


def generate(model: Any, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    torch.manual_seed(7)
    # Copies: some versions of transformers take entries out of such dictionaries.
    options = {name: dict(value) if isinstance(value, dict) else value for name, value in options.items()}
    texts: list[list[int]] = model.generate(ids, max_new_tokens=12, **options).tolist()
    return texts


def as_the_oracle_says(model: Any, ids: torch.Tensor, **options: Any) -> None:
    with DenseOracle(linear_gains(LAYERS, ALPHA), threshold=THRESHOLD).attached(model):
        expected = generate(model, ids, **options)
    with attnrb.patch(model, CONFIG):
        assert generate(model, ids, **options) == expected


@some_architectures
def test_text_does_not_depend_on_the_batch(name: str) -> None:
    model = tiny(name)
    lengths = [9, 3, 1, 6]
    ids, mask = tokens(4, 9), torch.zeros(4, 9, dtype=torch.int64)
    for row, length in zip(mask, lengths, strict=True):
        row[9 - length :] = 1
    with attnrb.patch(model, CONFIG):
        together = generate(model, ids, attention_mask=mask, do_sample=False)
        for row, length in enumerate(lengths):
            prompt = ids[row : row + 1, 9 - length :]
            alone = generate(model, prompt, attention_mask=torch.ones_like(prompt), do_sample=False)
            assert alone[0] == together[row][9 - length :]


@some_architectures
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "prefill_chunk_size": 4},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": False, "cache_implementation": "sliding_window"},
    ],
    ids=[
        "beams",
        "sampling",
        "several samples",
        "no cache",
        "static cache",
        "chunked prefill",
        "sampled beams",
        "sliding cache",
    ],
)
def test_ways_to_generate(name: str, options: dict[str, Any]) -> None:
    ids = tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    as_the_oracle_says(tiny(name), ids, attention_mask=mask, **options)


class NoStream:
    """Stands in for a stream of an accelerator, on a machine that has none."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...


@some_architectures
def test_offloaded_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's keys and values go away after it and are fetched before it; only the streams are not real."""
    from transformers.cache_utils import CacheLayerMixin

    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "Stream", NoStream)
        monkeypatch.setattr(torch.cuda, "Stream", NoStream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda *_: NoStream())
    moves: list[str] = []

    def elsewhere(layer: Any) -> None:
        moves.append("away")
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()

    def fetched(layer: Any) -> None:
        moves.append("back")

    monkeypatch.setattr(CacheLayerMixin, "offload", elsewhere)
    monkeypatch.setattr(CacheLayerMixin, "prefetch", fetched)
    as_the_oracle_says(tiny(name), tokens(2, 10), do_sample=False, cache_implementation="offloaded")
    assert name == "mistral" or {"away", "back"} <= set(moves)  # transformers leaves windows where they are


@pytest.mark.parametrize("backend", ["quanto", "hqq", "fp8"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "olmo2", "qwen3"])
def test_quantised_cache(name: str, backend: str) -> None:
    """All but the last four tokens are kept in four bits, or everything in eight."""
    from transformers import QuantizedCache

    options: dict[str, Any] = {"backend": backend}
    if backend != "fp8":
        axis = 0 if backend == "quanto" else 1
        options |= {"nbits": 4, "q_group_size": 8, "residual_length": 4, "axis_key": axis, "axis_value": axis}
    model = tiny(name)
    try:
        QuantizedCache(config=model.config, **options)
    except (ImportError, ValueError, TypeError) as error:
        pytest.skip(f"not offered here: {error}")
    as_the_oracle_says(model, tokens(2, 10), do_sample=False, cache_implementation="quantized", cache_config=options)


@some_architectures
def test_speculative_decoding(name: str) -> None:
    """With a smaller model that guesses, patched or not, and with guesses from the prompt."""
    model, guessing, ids = tiny(name), tiny(name), tokens(1, 10)
    generator = torch.Generator().manual_seed(0)
    for parameter in guessing.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    options = {"do_sample": False, "eos_token_id": 1}  # some versions of transformers need one
    as_the_oracle_says(model, ids, assistant_model=guessing, **options)
    as_the_oracle_says(model, ids, prompt_lookup_num_tokens=3, **options)
    with attnrb.patch(model, CONFIG):
        expected = generate(model, ids, **options)
        with attnrb.patch(guessing, CONFIG):
            assert generate(model, ids, assistant_model=guessing, **options) == expected


@some_architectures
def test_a_conversation_goes_on_from_its_cache(name: str) -> None:
    model = tiny(name)
    ids, more = tokens(1, 9), tokens(1, 5, seed=1)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    with attnrb.patch(model, CONFIG):
        first = model.generate(ids, **options)
        said = torch.cat([first.sequences, more], dim=1)
        second = model.generate(said, past_key_values=first.past_key_values, **options)
        assert second.sequences.tolist() == model.generate(said, **options).sequences.tolist()


def test_a_model_without_head() -> None:
    model = tiny("llama")
    ids = tokens(2, 12)
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        expected = model.model(ids).last_hidden_state
    with torch.no_grad(), attnrb.patch(model.model, CONFIG):
        assert torch.equal(model.model(ids).last_hidden_state, expected)


def test_a_model_that_calls_its_last_projection_a_decoder() -> None:
    model = tiny("llama")
    model.decoder = model.lm_head
    with torch.no_grad(), attnrb.patch(model, CONFIG) as patched:
        model(tokens(1, 4))
    assert patched.stats.layers == 3


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox", "gemma2", "gpt_oss"])
def test_embeddings_in_place_of_tokens(name: str) -> None:
    model = tiny(name)
    ids = tokens(2, 12)
    embeddings = model.get_input_embeddings()(ids).detach()
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        expected = model(ids).logits
        assert torch.equal(model(inputs_embeds=embeddings).logits, expected)
        text = model.generate(inputs_embeds=embeddings, max_new_tokens=6, do_sample=False)
        assert torch.equal(text, model.generate(ids, max_new_tokens=6, do_sample=False)[:, 12:])


@pytest.mark.parametrize("names", [("llama", "llama"), ("gemma3_text", "gpt_oss"), ("gpt2", "qwen3_next")], ids=str)
def test_two_patched_models_at_once(names: tuple[str, str]) -> None:
    one, other = (tiny(name) for name in names)
    ids = tokens(2, 12)
    with torch.no_grad():
        with attnrb.patch(one, CONFIG):
            expected = one(ids).logits
        with attnrb.patch(other, attnrb.RebalanceConfig(alpha=-0.3, threshold=0.1)):
            expected_other = other(ids).logits
        with attnrb.patch(one, CONFIG), attnrb.patch(other, attnrb.RebalanceConfig(alpha=-0.3, threshold=0.1)):
            assert torch.equal(one(ids).logits, expected)
            assert torch.equal(other(ids).logits, expected_other)
            assert torch.equal(one(ids).logits, expected)


def test_the_same_bits_every_time() -> None:
    model = tiny("gemma2")
    ids = tokens(2, 40)
    with torch.no_grad(), attnrb.patch(model, CONFIG):
        first = model(ids).logits
        assert torch.equal(model(ids).logits, first)
