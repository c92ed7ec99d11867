"""Every argument of the harness' own model, one by one: it counts, or it is refused by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("lm_eval")

from attnrb.evaluation import AttnrbLM
from attnrb.hosts.lm_eval import model as module
from attnrb.models import LoadedModel, ModelError
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from saved_tiny_model import tiny_tokenizer
from tiny_evaluation import roomy_model, save_roomy_model


class Loads(NamedTuple):
    """An option of loading: what `attnrb.models.load` is then told."""

    text: str
    told: Callable[[tuple[Any, ...], dict[str, Any]], Any]
    value: Any


class Scores(NamedTuple):
    """An option that the harness' class serves: what of the model shows it."""

    text: str
    shown: Callable[[Any], Any]
    value: Any


class Refused(NamedTuple):
    """An option that is refused, in any of these values."""

    texts: tuple[str, ...]


END = {"think_end_token": "</think>"}  # which the harness wants beside enable_thinking
WAYS: dict[str, tuple[Any, ...]] = {
    "pretrained": (Loads("FOLDER", lambda given, _: given[0], "FOLDER"), Refused(("/nowhere/at/all", "True"))),
    "backend": (Scores("causal", lambda lm: lm.backend, "causal"), Refused(("seq2seq", "other"))),
    "revision": (
        Loads("0.10", lambda _, named: named["revision"], "0.10"),
        Loads("main", lambda _, named: named["revision"], "main"),
    ),
    "subfolder": (Loads("7", lambda _, named: named["subfolder"], "7"), Refused(("nowhere",))),
    "tokenizer": (Loads("7", lambda _, named: named["tokenizer"], "7"), Refused(("/nowhere/at/all", "True"))),
    "truncation": (Scores("True", lambda lm: lm.truncation, True), Refused(("yes", "1"))),
    "logits_cache": (Scores("False", lambda lm: lm.logits_cache, False), Refused(("no", "0"))),
    "max_length": (Scores("17", lambda lm: lm.max_length, 17), Refused(("0", "-1", "1.5", "many", "1_0", "True"))),
    "device": (Loads("cpu", lambda given, _: str(given[2]), "cpu"), Refused(("gpu", "xpu:3"))),
    "dtype": (
        Loads("bfloat16", lambda given, _: given[1], "bfloat16"),
        Loads("auto", lambda given, _: given[1], "auto"),
        Refused(("float8", "int64")),
    ),
    "softmax_dtype": (
        Scores("float64", lambda lm: lm.softmax_dtype, torch.float64),
        Refused(("auto", "float99", "cuda", "int64", "1")),
    ),
    "mixed_precision_dtype": (
        Scores("bfloat16", lambda lm: lm.mixed_precision_dtype, torch.bfloat16),
        Refused(("auto", "half precision", "int8")),
    ),
    "batch_size": (
        Scores("3", lambda lm: lm._batch_size_option, 3),
        Scores("auto:4", lambda lm: (lm._batch_size_option, lm.batch_schedule), (None, 4)),
        Refused(("0", "auto:", "auto:x", "auto:0", "auto:inf", "autos", "1_0", "1.5")),
    ),
    "max_batch_size": (Scores("3", lambda lm: lm.max_batch_size, 3), Refused(("0", "auto", "1.5"))),
    "trust_remote_code": (Refused(("True",)),),
    "use_fast_tokenizer": (
        Loads("False", lambda _, named: named["tokenizer_options"], {"use_fast": False}),
        Refused(("slow", "0")),
    ),
    "add_bos_token": (
        Scores("True", lambda lm: lm.add_bos_token, True),
        Loads("True", lambda _, named: named["tokenizer_options"], {"add_bos_token": True}),
        Refused(("yes", "1")),
    ),
    "prefix_token_id": (Scores("7", lambda lm: lm.prefix_token_id, 7), Refused(("-1", "0.5", "<s>"))),
    "parallelize": (
        Loads("True", lambda _, named: named["options"]["device_map"], "auto"),
        Refused(("auto", "1")),
    ),
    # These three count with parallelize alone.
    "max_memory_per_gpu": (Refused(("10GiB",)),),
    "max_cpu_memory": (
        Loads("10GiB,parallelize=True", lambda _, named: named["options"]["max_memory"], {"cpu": "10GiB"}),
        Refused(("10GiB",)),
    ),
    "offload_folder": (
        Loads("x,parallelize=True", lambda _, named: named["options"]["offload_folder"], "x"),
        Refused(("x",)),
    ),
    "tp_plan": (Refused(("auto",)),),
    "peft": (Loads("7", lambda _, named: named["adapter"], "7"), Refused(("/nowhere/at/all", "x,delta=y"))),
    "delta": (Loads("7", lambda _, named: named["delta"], "7"), Refused(("/nowhere/at/all",))),
    "autogptq": (Refused(("True", "folder")),),
    "gptqmodel": (Refused(("True",)),),
    "gguf_file": (Loads("a.gguf", lambda _, named: named["gguf_file"], "a.gguf"), Refused(("nowhere.gguf",))),
    "think_end_token": (
        Scores("</think>", lambda lm: lm.think_end_token, "</think>"),
        Scores("7", lambda lm: lm.think_end_token, 7),
        Refused(("True", "0.5")),
    ),
    "enable_thinking": (
        Scores("True,think_end_token=</t>", lambda lm: lm.chat_template_args, {"enable_thinking": True}),
        Refused(("True", "maybe")),
    ),
    "chat_template_args": (Refused(("x", "3")),),
}

PARAMETERS = [name for name in inspect.signature(HFLM.__init__).parameters if name not in ("self", "kwargs")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_roomy_model(tmp_path_factory.mktemp("models") / "tiny")


def made(folder: Path, name: str, text: str) -> Any:
    model = str(folder) if text == "FOLDER" else text
    arguments = f"pretrained={model}" if name == "pretrained" else f"pretrained={folder},{name}={text}"
    return get_model("attnrb").create_from_arg_string(f"{arguments},plain=True")


def test_every_parameter_has_its_way() -> None:
    """One that a new harness brings must be looked at before it is taken, and is refused until then."""
    assert set(PARAMETERS) == set(WAYS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_it_counts(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    ways = [way for way in WAYS[name] if not isinstance(way, Refused)]
    told: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def load(*given: Any, **named: Any) -> LoadedModel:
        told.append((given, named))
        return LoadedModel(roomy_model(), tiny_tokenizer())

    monkeypatch.setattr(module, "load", load)
    usual = made(folder, "plain", "True")
    for way in ways:
        lm = made(folder, name, way.text)
        if isinstance(way, Loads):
            found = way.told(*told[-1])
            assert found == (str(folder) if way.value == "FOLDER" else way.value)
            assert told[-1] != told[0] or way.text in ("FOLDER", "cpu")
        else:
            assert way.shown(lm) == way.value
            assert way.shown(usual) != way.value or way.text == "causal"


@pytest.mark.parametrize("name", PARAMETERS)
def test_it_is_refused_by_name(folder: Path, name: str) -> None:
    for text in next((way.texts for way in WAYS[name] if isinstance(way, Refused)), ()):
        with pytest.raises((ValueError, TypeError, ModelError)) as error:
            made(folder, name, text)
        message = str(error.value)
        assert name in message or (name in ("pretrained", "subfolder", "gguf_file") and text in message), message


@pytest.mark.parametrize("settings", [{"a": 1}, {}])
def test_arguments_of_the_chat_template(settings: dict[str, Any]) -> None:
    lm = AttnrbLM(roomy_model(), tokenizer=tiny_tokenizer(), plain=True, chat_template_args=settings, **END)
    assert (lm.chat_template_args, lm.think_end_token) == (settings, "</think>")


def test_a_parameter_that_the_harness_adds_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = HFLM.__init__

    def later(self: Any, *given: Any, shiny: int = 0, **named: Any) -> None:
        before(self, *given, **named)

    monkeypatch.setattr(HFLM, "__init__", later)
    with pytest.raises(ValueError, match="shiny: the model attnrb has no such option"):
        made(folder, "shiny", "3")


def test_a_loaded_tokenizer_takes_no_option_of_loading(folder: Path) -> None:
    with pytest.raises(ValueError, match="use_fast_tokenizer: this tokenizer is loaded already"):
        AttnrbLM(str(folder), tokenizer=tiny_tokenizer(), plain=True, use_fast_tokenizer=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha=1_0", "alpha: expected a number"),
        ("alpha=\N{ARABIC-INDIC DIGIT ONE}", "alpha: expected a number"),
        ("alpha=nan", "alpha: expected a finite number"),
        ("threshold=inf", "threshold: expected a finite number"),
        ("max_length=1_0", "max_length: expected a whole number"),
        ("layers=1_0", "layers: expected numbers and ranges"),
    ],
)
def test_what_is_no_number(folder: Path, text: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        get_model("attnrb").create_from_arg_string(f"pretrained={folder},{text}")


@pytest.mark.parametrize("name", ["mixed_precision_dtype", "parallelize", "peft", "softmax_dtype"])
def test_what_vllm_does_not_heed(name: str) -> None:
    from attnrb.hosts.lm_eval.vllm import VllmLM

    with pytest.raises(ValueError, match=f"{name}: vLLM scores the choices"):
        VllmLM("x", **{name: "bfloat16"})


class TestBudget:
    """Settings of a generation within a budget of computed tokens, which is greedy."""

    def answer(self, **settings: Any) -> list[str]:
        lm = AttnrbLM(roomy_model(), tokenizer=tiny_tokenizer(), plain=True, batch_size=1)
        arguments = ("the quick brown", {"max_computed_tokens": 3, "answer_tokens": 2, **settings})
        found: list[str] = lm.generate_until([Instance("generate_until", {}, arguments, 0)], disable_tqdm=True)
        return found

    @pytest.mark.parametrize(
        "settings",
        [
            {"do_sample": True},
            {"temperature": 0.8},
            {"num_beams": 3},
            {"top_p": 0.9},
            {"repetition_penalty": 1.2},
            {"max_computed_token": 3},
        ],
        ids=lambda settings: next(iter(settings)),
    )
    def test_what_would_not_count_is_refused(self, settings: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"^{next(iter(settings))}: within a budget"):
            self.answer(**settings)

    def test_what_tasks_bring_is_taken(self) -> None:
        usual = {"until": ["\n\n"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 9, "num_beams": 1}
        assert self.answer(**usual) == self.answer()
