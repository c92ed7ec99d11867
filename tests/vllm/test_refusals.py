"""What cannot be served is refused when the engine starts, by name; and which names of vLLM attnrb stands on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engines
import pytest
import vllm
from attnrb.hosts.vllm.plugin import INTERFACE, TRIED, missing_interface
from vllm.engine.arg_utils import EngineArgs


def test_the_interface_of_vllm_is_where_it_was() -> None:
    assert missing_interface() == [], f"vLLM {vllm.__version__} moved these"
    assert len(INTERFACE) > 10


def test_this_version_is_one_that_was_tried() -> None:
    assert any(vllm.__version__.startswith(f"{minor}.") for minor in TRIED), vllm.__version__


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("llama")
    engines.tiny_model("llama", found)
    return found


def start(folder: Path, options: Any = "off", **engine: Any) -> Any:
    """As far as an engine's configuration: nothing is started."""
    additional = {} if options is None else {"attnrb": options}
    usual = {"dtype": "float32", "max_model_len": 256, "skip_tokenizer_init": True}
    return EngineArgs(model=str(folder), additional_config=additional, **{**usual, **engine}).create_engine_config()


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"kv_cache_dtype": "fp8"}, "quantised caches"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"runner": "pooling"}, "pooling models"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "KV connectors",
        ),
    ],
)
def test_what_is_not_served_is_named(folder: Path, engine: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        start(folder, **engine)
    start(folder, None, **engine)  # nothing is refused where nobody asked


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "louder"}, "expected one of compose, emphasis"),
        ({"alpha": "x"}, "alpha: expected a number"),
        ({"policy": "rebalance", "source_layer": 9}, "source_layer"),
        ({"policy": "sinks"}, "enable_chunked_prefill"),
        (7, "expected a mapping"),
    ],
)
def test_a_wrong_policy_is_named(folder: Path, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        start(folder, options)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "kv_lora_rank": 16,
             "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
             "n_routed_experts": 4, "first_k_dense_replace": 9, "moe_layer_freq": 1},
            "MLA",
        ),
        ({"attention_chunk_size": 64}, "attention in chunks"),
    ],
)  # fmt: skip
def test_models_that_are_not_served_are_named(folder: Path, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}), "utf-8")
    with pytest.raises(ValueError, match=said):
        start(tmp_path)


def test_a_layer_with_other_attention_is_found_out() -> None:
    from types import SimpleNamespace

    from attnrb.hosts.vllm.batch import Rows
    from attnrb.hosts.vllm.listener import check_layers
    from attnrb.policies import ModelShape, Plain

    def config(**layers: Any) -> Any:
        named = {f"model.layers.{name[1:]}.self_attn.attn": SimpleNamespace(impl=impl) for name, impl in layers.items()}
        return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=named))

    rows = Rows(Plain(), ModelShape(2, 4))
    ours, other = SimpleNamespace(attnrb=True, num_heads=4), SimpleNamespace(num_heads=4)
    check_layers(config(l0=ours, l1=ours), rows)
    with pytest.raises(NotImplementedError, match=r"layers \[1\] is not attnrb's"):
        check_layers(config(l0=ours, l1=other), rows)
    with pytest.raises(NotImplementedError, match="layer 1 has 2 query heads"):
        check_layers(config(l0=ours, l1=SimpleNamespace(attnrb=True, num_heads=2)), rows)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"parallel_config": {"decode_context_parallel_size": 2}}, "decode context parallelism"),
        ({"parallel_config": {"prefill_context_parallel_size": 2}}, "prefill context parallelism"),
        ({"parallel_config": {"enable_dbo": True}}, "two batches at once"),
        ({"model_config": {"is_encoder_decoder": True}}, "encoder-decoder models"),
        ({"model_config": {"is_attention_free": True}}, "models without attention"),
        ({"model_config": {"is_hybrid": True}}, "mix attention with other layers"),
        ({"model_config": {"is_mm_prefix_lm": True}}, "image tokens see each other"),
        ({"cache_config": {"cache_dtype": "int8_per_token_head"}}, "quantised caches"),
    ],
)
def test_what_no_engine_here_can_be_started_with_is_named_too(
    folder: Path, changed: dict[str, dict[str, Any]], said: str
) -> None:
    """By a configuration that says so: this platform, or the tiny model, has not got it."""
    from attnrb.hosts.vllm.refusals import refuse

    config = start(folder)
    for name, values in changed.items():
        setattr(config, name, _Saying(getattr(config, name), values))
    with pytest.raises(ValueError, match=said):
        refuse(config)


class _Saying:
    """Another object, some of whose attributes say something else."""

    def __init__(self, other: Any, values: dict[str, Any]) -> None:
        self._other, self._values = other, values

    def __getattr__(self, name: str) -> Any:
        return self._values[name] if name in self._values else getattr(self._other, name)


def test_position_biases_are_refused_where_the_model_is_made(tmp_path: Path) -> None:
    import transformers

    config = transformers.BloomConfig(
        vocab_size=engines.VOCABULARY, hidden_size=128, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    transformers.BloomForCausalLM(config).float().save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"position biases \(alibi\)"), engines.engine(tmp_path, "off"):
        pass
