"""attnrb from Python as people arrive from other tools: names at hand, one syntax, and what a refusal advises."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from typing import Any

import attnrb
import numpy as np
import pytest
import torch
from attnrb import Emphasis, Rebalance, SinkDamping
from attnrb.policies.checks import as_ranges, read_ranges

MODULES = ("analysis", "evaluation", "functional", "models", "policies", "protocols", "reference", "studies", "text")


def test_dir_shows_what_is_meant_for_users() -> None:
    shown = [each for each in dir(attnrb) if not each.startswith("__")]
    assert set(shown) == {each for each in attnrb.__all__ if not each.startswith("__")} | {*MODULES}


@pytest.mark.slow
def test_modules_are_at_hand_and_imported_when_they_are_used() -> None:
    pytest.importorskip("transformers")
    code = (
        "import sys, attnrb\n"
        "before = {name for name in sys.modules if name.startswith('attnrb.')}\n"
        "assert not before & {'attnrb.analysis', 'attnrb.evaluation', 'attnrb.models', 'attnrb.studies'}, before\n"
        "print(attnrb.models.load.__module__, attnrb.analysis.analyze.__name__, attnrb.studies.__name__)\n"
        "print(attnrb.evaluation.__name__, hasattr(attnrb, 'nonsense'))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.split() == ["attnrb.models", "analyze", "attnrb.studies", "attnrb.evaluation", "False"]


# ------------------------------------------------------------------------------------------------- layers and heads

SYNTAX = [
    "1-3,5",
    "1-3+5",
    " 1 - 3 , 5",
    [5, 1, 2, 3],
    (1, 2, 3, 5, 5),
    np.array([1, 2, 3, 5]),
    torch.tensor([1, 2, 3, 5]),
]


@pytest.mark.parametrize("written", SYNTAX, ids=str)
def test_layers_and_heads_have_one_syntax(written: Any) -> None:
    chosen = (1, 2, 3, 5)
    for policy in (Rebalance, Emphasis, SinkDamping):
        assert policy(layers=written).layers == chosen
        assert policy(heads=written).heads == chosen
        assert policy(heads={2: written}).heads == {2: chosen}
    assert attnrb.Custom(lambda view: None, layers=written).layers == chosen


def test_a_range_is_one_too() -> None:
    assert Rebalance(layers=range(1, 4)).layers == (1, 2, 3)
    assert Rebalance(layers=range(1, 4)) == Rebalance(layers="1-3")


@pytest.mark.parametrize("wrong", ["", "1-", "a", "3-1", "1,,2", "1.5"])
def test_text_that_is_neither_names_the_option(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"^layers: "):
        Rebalance(layers=wrong)
    with pytest.raises(ValueError, match=r"^heads\[1\]: "):
        Rebalance(heads={1: wrong})


def test_ranges_are_written_as_they_are_read() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        numbers = sorted({int(each) for each in generator.integers(0, 30, generator.integers(1, 20))})
        assert read_ranges("x", as_ranges(numbers)) == numbers
    assert as_ranges(range(30, 100)) == "30-99"


@pytest.mark.parametrize(
    ("policy", "wrong", "near"),
    [(Rebalance, "alfa", "alpha"), (Emphasis, "strenght", "strength"), (SinkDamping, "layer", "layers")],
)
def test_a_misspelt_option_is_told_from_those_that_there_are(policy: Any, wrong: str, near: str) -> None:
    with pytest.raises(TypeError, match=rf"^{wrong}: unknown option of {policy.__name__}; did you mean {near}\? known"):
        policy(**{wrong: 1})
    assert near in inspect.signature(policy).parameters


def public_functions() -> dict[str, Any]:
    """What the API reference lists, and the methods of its classes."""
    found = {}
    for name in (*MODULES, ""):
        module = importlib.import_module(f"attnrb.{name}".rstrip("."))
        for each in getattr(module, "__all__", ()):
            value = getattr(module, each)
            found[f"{name}.{each}"] = value
            if isinstance(value, type):
                found |= {f"{name}.{each}.{method}": made for method, made in vars(value).items() if callable(made)}
    return found


def test_editors_are_told_what_a_model_and_a_tokenizer_are() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("lm_eval")
    functions, told = public_functions(), 0
    for name, function in functions.items():
        annotations = getattr(inspect.unwrap(function), "__annotations__", {})
        for parameter in ("model", "tokenizer", "baseline"):
            kind = str(annotations.get(parameter, "str"))
            told += "Model" in kind or "Tokenizer" in kind
            assert not kind.startswith("Any"), f"{name}: {parameter}"
    assert told > 12


# ---------------------------------------------------------------------------------------------------------- patches


@pytest.fixture
def model() -> Any:
    pytest.importorskip("transformers")
    from saved_tiny_model import tiny_model

    return tiny_model()


def test_update_takes_what_patch_takes(model: Any) -> None:
    with attnrb.patch(model, alpha=0.1) as patched:
        ids = torch.tensor([[5, 6, 7, 8]])
        model(ids)
        patched.update(alpha=0.3, layers="1")
        assert patched.policy == Rebalance(alpha=0.3, layers=[1])
        patched.update({"policy": "emphasis", "strength": 2})
        assert patched.policy == Emphasis(strength=2)
        patched.update(Rebalance())
        for wrong in ((), ("emphasis",)):
            with pytest.raises(TypeError, match="policy: expected"):
                patched.update(*wrong)
        assert patched.policy == Rebalance()
        assert patched.stats.forwards == 1
        patched.stats.reset()
        assert patched.stats.to_dict() == type(patched.stats)().to_dict()
        model(ids)
        assert patched.stats.forwards == 1


def test_updated_gives_what_a_new_patch_gives(model: Any) -> None:
    ids = torch.arange(5, 25)[None]
    with attnrb.patch(model, alpha=0.9):
        expected = model(ids).logits
    with attnrb.patch(model, Rebalance()) as patched:
        patched.update(alpha=0.9)
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("policy", "advice"),
    [
        ("emphasis", "parse_policy reads text"),
        (Emphasis, r"make one, as Emphasis\(\)"),
        (0.3, "name the option, as alpha=0.3"),
    ],
)
def test_what_is_no_policy_is_refused_with_what_to_do(model: Any, policy: Any, advice: str) -> None:
    with pytest.raises(TypeError, match=advice):
        attnrb.patch(model, policy)
    assert attnrb.patched(model) is None


def test_what_is_no_model_is_refused_with_what_to_do(model: Any) -> None:
    class Pipeline:
        def __init__(self) -> None:
            self.model = model

    for given, advice in (
        (Pipeline(), r"pass its model, as \.model"),
        ("gpt2", "load it first"),
        ((model, 1), "alone"),
    ):
        with pytest.raises(TypeError, match=advice):
            attnrb.patch(given)


def test_shapes_of_a_patched_model_without_weights(model: Any) -> None:
    """On the meta device, where tools ask what comes out, there is a shape for every policy and no value."""
    model.to("meta")
    ids = torch.zeros(1, 6, dtype=torch.int64, device="meta")
    expected = model(ids).logits
    with attnrb.patch(model, alpha=0.3):
        found = model(ids).logits
    assert (found.device.type, found.shape, found.dtype) == ("meta", expected.shape, expected.dtype)


def test_an_encoder_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=32, **sizes)).eval()
    with pytest.raises(NotImplementedError, match="attention of BertModel goes both ways"):
        attnrb.patch(encoder)
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=32, is_decoder=True, **sizes)).eval()
    with attnrb.patch(decoder) as patched:
        decoder(torch.tensor([[1, 2, 3]]))
    assert patched.stats.forwards == 1


def test_protocols_are_what_transformers_has(model: Any) -> None:
    from attnrb.protocols import LanguageModel, LoadedTokenizer, Model, Tokenizer
    from saved_tiny_model import tiny_tokenizer

    for kind, real in (
        (Model, torch.nn.Linear(1, 1)),
        (LanguageModel, model),
        (Tokenizer, tiny_tokenizer()),
        (LoadedTokenizer, tiny_tokenizer()),
    ):
        parts = {name for each in kind.__mro__ for name in (*vars(each), *vars(each).get("__annotations__", {}))}
        named = {name for name in parts if not name.startswith("_")} | ({"__call__"} & parts)
        assert named
        assert [name for name in named if not hasattr(real, name)] == []
