"""The lm-eval model swallows nothing: options, empty continuations, answers of another policy, NaN, foreign tokens."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from attnrb.evaluation import AttnrbLM
from attnrb.models import ModelError
from attnrb.policies.learned import LearnedGains
from attnrb.policies.rebalance import RebalanceConfig
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from saved_tiny_model import tiny_model, tiny_tokenizer
from tiny_evaluation import roomy_model, save_roomy_model

PAIRS = [("the quick brown", " fox"), ("the slow green", " turtle walks"), ("over the", " lazy dog")]
# Both sum float32 logits of the order of 10; padding and batches order the sums in other ways.
LIKE = {"abs": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_roomy_model(tmp_path_factory.mktemp("models") / "tiny")


def made(kind: str, arguments: str) -> Any:
    return get_model(kind).create_from_arg_string(arguments, {"batch_size": 2, "device": "cpu"})


def scores(lm: Any, pairs: list[tuple[str, str]] = PAIRS) -> list[float]:
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    return [each[0] for each in lm.loglikelihood(requests, disable_tqdm=True)]


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("option", "close"),
    [
        ("alfa=0.9", "alpha"),
        ("layer=3", "layers"),
        ("tresholds=0.1", "threshold"),
        ("pefft=x", "peft"),
        ("sub_folder=x", "subfolder"),
        ("revison=x", "revision"),
        ("max_len=12", "max_length"),
        ("max_position_embedding=64", "max_position_embeddings"),
        ("load_in_4bits=True", "its own are"),
    ],
)
def test_a_misspelt_option_raises_and_names_near_ones(folder: Path, option: str, close: str) -> None:
    with pytest.raises(ValueError, match="the model attnrb has no such option") as error:
        made("attnrb", f"pretrained={folder},{option}")
    assert str(error.value).startswith(f"{option.partition('=')[0]}: ")
    assert close in str(error.value)


@pytest.mark.parametrize(
    "option",
    [
        "trust_remote_code=True",
        "autogptq=True",
        "gptqmodel=True",
        "tp_plan=auto",
        "backend=seq2seq",
        "max_cpu_memory=1GiB",
        "plain=yes",
        "allow_missing=1",
        "peft=/nowhere/at/all",
        "tokenizer=/nowhere/at/all",
        "subfolder=nowhere",
        "alpha=much",
        "gains=/nowhere/at/all",
        "heads=99",
        "normalize=maybe",
        "parallelize=perhaps",
        "max_length=-5",
        "max_length=0",
        "max_length=many",
        "prefix_token_id=-1",
        "max_batch_size=0",
        "max_batch_size=some",
    ],
)
def test_what_cannot_be_honoured_raises_and_names_it(folder: Path, option: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises((ValueError, TypeError, ModelError), match=r"^(model: |peft: |)") as error:
        made("attnrb", f"pretrained={folder},{option}")
    assert name in str(error.value) or option.partition("=")[2] in str(error.value)


def test_every_option_of_hf_is_honoured_or_refused_by_name(folder: Path) -> None:
    """None of them may be taken and forgotten: each given here changes what is loaded, or raises."""
    from attnrb.hosts.lm_eval import options

    parameters = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
    served = set(options._KNOWN) | set(options._REFUSED)
    assert parameters <= served


@pytest.mark.parametrize("rows", [0, -1, "0", "some", "autos", True, 1.5, ""])
def test_numbers_of_rows(folder: Path, rows: Any) -> None:
    with pytest.raises(ValueError, match="batch_size: expected a number of 1 or above or 'auto'"):
        AttnrbLM(str(folder), plain=True, batch_size=rows)
    with pytest.raises(ValueError, match="max_batch_size: expected a number of 1 or above, got"):
        AttnrbLM(str(folder), plain=True, max_batch_size=rows)


def changed(what: str) -> tuple[Any, Any]:
    """The tiny model and its tokenizer, in one respect another."""
    model, tokenizer = roomy_model(), tiny_tokenizer()
    if what == "a weight":
        with torch.no_grad():
            model.lm_head.weight[-1, -1] += 1e-3
    if what == "an option of the model":
        model.config.rms_norm_eps *= 10
    if what == "a token":
        tokenizer.add_tokens(["<new>"])
    if what == "the chat template":
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
    if what == "the padding":
        tokenizer("the quick brown", truncation=True, max_length=2)
        tokenizer.backend_tokenizer.enable_padding(length=9)
    return model, tokenizer


@pytest.mark.parametrize("what", ["a weight", "an option of the model", "a token", "the chat template"])
def test_answers_of_another_model_do_not_answer(what: str) -> None:
    """Neither from the harness' cache nor from a run's file, both of which go by the digest."""

    def digest(what: str) -> str:
        model, tokenizer = changed(what)
        return AttnrbLM(model, tokenizer=tokenizer, plain=True).digest()

    assert digest(what) != digest("nothing")
    assert digest("the padding") == digest("nothing") == digest("nothing")  # how it was called last is no matter


def test_plain_and_a_policy_contradict(folder: Path) -> None:
    with pytest.raises(ValueError, match="alpha: plain leaves the model as it is"):
        made("attnrb", f"pretrained={folder},plain=True,alpha=0.5")
    with pytest.raises(ValueError, match="alpha: a whole policy stands in place"):
        AttnrbLM(str(folder), config=RebalanceConfig(), alpha=0.5)


@pytest.mark.parametrize("option", ["revision=x", "dtype=float16", "peft=x", "subfolder=x", "use_fast_tokenizer=True"])
def test_options_that_come_too_late_for_a_loaded_model(option: str) -> None:
    name, _, value = option.partition("=")
    with pytest.raises(ValueError, match=f"{name}: this model is loaded already"):
        AttnrbLM(roomy_model(), tokenizer=tiny_tokenizer(), **{name: value})


def test_a_misspelt_option_of_a_loaded_model() -> None:
    with pytest.raises(ValueError, match=r"alfa: .* did you mean alpha\?"):
        AttnrbLM(roomy_model(), tokenizer=tiny_tokenizer(), alfa=0.1)


@pytest.mark.parametrize(
    "option",
    [
        "max_length=4",
        "add_bos_token=True",
        "add_bos_token=False",
        "prefix_token_id=7",
        "softmax_dtype=float64",
        "logits_cache=False",
        "mixed_precision_dtype=bfloat16",
        "rms_norm_eps=0.1",
    ],
)
def test_what_hf_honours_counts_the_same(folder: Path, option: str) -> None:
    pairs = [*PAIRS, ("", "the fox")]
    ours = scores(made("attnrb", f"pretrained={folder},plain=True,{option}"), pairs)
    # Under autocast two batches of bfloat16 differ by roundings of 2**-8 of logits of the order of 10.
    near = {"abs": 0.3} if "bfloat16" in option else LIKE
    assert ours == pytest.approx(scores(made("hf", f"pretrained={folder},dtype=float32,{option}"), pairs), **near)
    if option.partition("=")[0] in ("max_length", "prefix_token_id", "rms_norm_eps"):
        assert ours != pytest.approx(scores(made("attnrb", f"pretrained={folder},plain=True"), pairs), **LIKE)


def test_another_tokenizer_and_a_subfolder(folder: Path, tmp_path: Path) -> None:
    other = tiny_tokenizer("{{ messages }}")
    other.save_pretrained(tmp_path / "other")
    lm = made("attnrb", f"pretrained={folder.parent},subfolder=tiny,tokenizer={tmp_path / 'other'},plain=True")
    assert lm.tokenizer.chat_template == "{{ messages }}"
    assert scores(lm) == pytest.approx(scores(made("attnrb", f"pretrained={folder},plain=True")), **LIKE)


def test_an_adapter_counts_as_with_hf_and_is_rebalanced(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(roomy_model(), lora).save_pretrained(tmp_path / "adapter")
    base, adapted = f"pretrained={folder},", f"pretrained={folder},peft={tmp_path / 'adapter'},"
    theirs = scores(made("hf", adapted + "dtype=float32"))
    assert scores(made("attnrb", adapted + "plain=True")) == pytest.approx(theirs, **LIKE)
    assert scores(made("attnrb", adapted + "alpha=0.0")) == pytest.approx(theirs, **LIKE)
    assert scores(made("attnrb", base + "plain=True")) != pytest.approx(theirs, **LIKE)
    assert scores(made("attnrb", adapted + "alpha=4.0")) != pytest.approx(theirs, **LIKE)
    assert made("attnrb", adapted + "plain=True").get_model_info()["model_num_parameters"]


def test_delta_weights_count_as_with_hf(folder: Path, tmp_path: Path) -> None:
    delta = roomy_model()
    with torch.no_grad():
        for weight in delta.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) / 10)
    delta.save_pretrained(tmp_path / "delta")
    option = f"pretrained={folder},delta={tmp_path / 'delta'},"
    theirs = scores(made("hf", option + "dtype=float32"))
    assert scores(made("attnrb", option + "plain=True")) == pytest.approx(theirs, **LIKE)


def test_learnt_gains_and_heads_are_evaluated(folder: Path, tmp_path: Path) -> None:
    learned = LearnedGains(tiny_model(), RebalanceConfig(alpha=2.0))
    with torch.no_grad():
        learned.gains += 1.0
    learned.save(tmp_path)
    found = scores(made("attnrb", f"pretrained={folder},gains={tmp_path}"))
    assert found == pytest.approx(scores(AttnrbLM(str(folder), config=learned)), **LIKE)
    assert found != pytest.approx(scores(made("attnrb", f"pretrained={folder},alpha=2.0")), **LIKE)
    with pytest.raises(ValueError, match="alpha: learnt gains bring their own"):
        made("attnrb", f"pretrained={folder},gains={tmp_path},alpha=0.3")
    one = scores(made("attnrb", f"pretrained={folder},alpha=4.0,heads=0+2,layers=1-2"))
    assert one == pytest.approx(
        scores(AttnrbLM(str(folder), config=RebalanceConfig(alpha=4.0, heads=(0, 2), layers=(1, 2)))), **LIKE
    )
    listed = scores(made("attnrb", f"pretrained={folder},gains=0+1.5+2"))
    assert listed == pytest.approx(scores(AttnrbLM(str(folder), config=RebalanceConfig(gains=(0, 1.5, 2)))), **LIKE)


# ------------------------------------------------------------------------------------------------ requests


@pytest.fixture(scope="module")
def lm() -> AttnrbLM:
    return AttnrbLM(roomy_model(), tokenizer=tiny_tokenizer(), plain=True, batch_size=2)


@pytest.mark.parametrize("others", [[], PAIRS])
@pytest.mark.parametrize("pair", [("the quick", ""), ("", "")], ids=["empty", "both"])
def test_a_continuation_without_a_token_is_refused(
    lm: AttnrbLM, pair: tuple[str, str], others: list[tuple[str, str]]
) -> None:
    with pytest.raises(AssertionError, match="request: ") as error:
        scores(lm, [*others, pair])
    assert isinstance(error.value, ValueError)
    assert scores(lm)  # the next request is answered


@pytest.mark.parametrize("others", [[], PAIRS])
def test_a_continuation_that_merges_into_the_context_is_no_certain_answer(
    lm: AttnrbLM, others: list[tuple[str, str]]
) -> None:
    context, whole = lm.tok_encode("the slow gr"), lm.tok_encode("the slow green")
    assert len(whole) <= len(context)  # so that nothing is left of "een" behind the context
    own = lm.tok_encode("een")
    with torch.inference_mode():
        rows = lm.model(torch.tensor([[*context, *own]])).logits[0].double().log_softmax(-1)
    expected = sum(float(rows[len(context) - 1 + place, token]) for place, token in enumerate(own))
    with pytest.warns(UserWarning, match="'een' merges into the last token of its context"):
        found = scores(lm, [*others, ("the slow gr", "een")])
    assert found[-1] == pytest.approx(expected, **LIKE)


def test_a_continuation_longer_than_the_window_is_refused() -> None:
    short = AttnrbLM(roomy_model(), tokenizer=tiny_tokenizer(), plain=True, max_length=4)
    with pytest.raises(AssertionError, match=r"has \d+ tokens, more than the model's window of 4"):
        scores(short, [("the", " quick brown fox jumps over the lazy dog while a slow green turtle walks")])
    theirs = HFLM(roomy_model(), tokenizer=tiny_tokenizer(), max_length=4, batch_size=1)
    pair = [("the quick brown fox jumps over", " the lazy")]
    assert scores(short, pair) == pytest.approx(scores(theirs, pair), **LIKE)


def test_a_rolling_text_is_scored_as_with_hf(lm: AttnrbLM) -> None:
    theirs = HFLM(roomy_model(), tokenizer=tiny_tokenizer(), batch_size=1)
    requests = [Instance("loglikelihood_rolling", {}, ("the quick brown fox",), 0)]
    ours = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours == pytest.approx(theirs.loglikelihood_rolling(requests, disable_tqdm=True), **LIKE)


def broken(lm_options: dict[str, Any] | None = None) -> AttnrbLM:
    model = roomy_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    return AttnrbLM(model, tokenizer=tiny_tokenizer(), plain=True, batch_size=1, **(lm_options or {}))


def test_logits_that_are_no_numbers_stop_with_a_sentence() -> None:
    lm = broken()
    with pytest.raises(ValueError, match="its logits are not finite"):
        scores(lm)
    arguments = ("the quick", {"until": ["\n"], "max_gen_toks": 3})
    with pytest.raises(ValueError, match="its logits are not finite"):
        lm.generate_until([Instance("generate_until", {}, arguments, 0)], disable_tqdm=True)
    with pytest.raises(ValueError, match="its logits are not finite"):
        lm.compute(["the quick"], minimum=0, maximum=3, answer_tokens=2)


def test_a_tokenizer_of_more_tokens_than_the_model() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["turtle"])
    lm = AttnrbLM(roomy_model(), tokenizer=tokenizer, plain=True, batch_size=1)
    with pytest.raises(ValueError, match=r"tokenizer: it gives the token \d+, but the model's embedding has 320 rows"):
        scores(lm, [("the slow", " turtle")])
    assert scores(lm, [("the slow", " fox")])


@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 3},
        {"return_dict_in_generate": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"stop_strings": ["zzz"]},
        {"min_new_tokens": 5},
    ],
    ids=lambda own: "+".join(own),
)
def test_a_model_of_its_own_settings_computes_the_same(own: dict[str, Any]) -> None:
    def computed(settings: dict[str, Any]) -> Any:
        model = roomy_model()
        for name, value in settings.items():
            setattr(model.generation_config, name, value)
        lm = AttnrbLM(model, tokenizer=tiny_tokenizer(), plain=True, batch_size=2)
        texts = ["the quick", "a slow green turtle"]
        return [each.reading for each in lm.compute(texts, minimum=0, maximum=6, answer_tokens=3)]

    assert computed(own) == computed({})


# ------------------------------------------------------------------------------------------------ the cache


class TestCache:
    def cached(self, folder: Path, place: Path, kind: str, arguments: str) -> tuple[Any, list[int]]:
        """A cached model, and how many requests reached the model itself."""
        lm = made(kind, f"pretrained={folder},{arguments}")
        reached: list[int] = []
        inner = lm.loglikelihood

        def counted(requests: Any, **more: Any) -> Any:
            reached.append(len(requests))
            return inner(requests, **more)

        lm.loglikelihood = counted
        return CachingLM(lm, str(place / "answers.db")), reached

    def ask(self, lm: Any) -> list[float]:
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]
        return [each[0] for each in lm.loglikelihood(requests)]

    def test_another_policy_is_not_answered_for(self, folder: Path, tmp_path: Path) -> None:
        pytest.importorskip("sqlitedict")
        expected: dict[str, list[float]] = {}
        for options in ("plain=True", "alpha=4.0", "alpha=4.0,threshold=0.3", "plain=True,rms_norm_eps=0.1"):
            lm, reached = self.cached(folder, tmp_path, "attnrb", options)
            expected[options] = self.ask(lm)
            assert reached == [len(PAIRS)], options
            assert expected[options] == pytest.approx(scores(made("attnrb", f"pretrained={folder},{options}")), **LIKE)
        assert len({tuple(found) for found in expected.values()}) == len(expected)
        for options, found in expected.items():
            lm, reached = self.cached(folder, tmp_path, "attnrb", options)
            assert self.ask(lm) == found
            assert reached == []

    def test_one_that_hf_filled(self, folder: Path, tmp_path: Path) -> None:
        pytest.importorskip("sqlitedict")
        theirs, _ = self.cached(folder, tmp_path, "hf", "dtype=float32")
        self.ask(theirs)
        ours, reached = self.cached(folder, tmp_path, "attnrb", "alpha=4.0")
        found = self.ask(ours)
        assert reached == [len(PAIRS)]
        assert found == pytest.approx(scores(made("attnrb", f"pretrained={folder},alpha=4.0")), **LIKE)

    def test_a_policy_put_on_for_a_while(self, folder: Path, tmp_path: Path) -> None:
        pytest.importorskip("sqlitedict")
        lm, reached = self.cached(folder, tmp_path, "attnrb", "plain=True")
        plain = self.ask(lm)
        with lm.rebalanced(RebalanceConfig(alpha=4.0)):
            strong = self.ask(lm)
        assert strong != pytest.approx(plain, **LIKE)
        assert self.ask(lm) == plain
        assert reached == [len(PAIRS), len(PAIRS)]
