"""Defaults of the process change nothing: dtype, device, inference mode, determinism, anomaly detection."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attnrb
from attnrb import functional
from attnrb.analysis import analyze
from attnrb.policies import LearnedGains, Rebalance
from attnrb.studies.compare import compare
from saved_tiny_model import TEXT, tiny_model, tiny_tokenizer

POLICY = Rebalance(alpha=1.0, threshold=0.05)
PACKAGE = Path(attnrb.__file__).parent
CPU = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture(autouse=True)
def usual_defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)


# Everything that is made on the default device lies on the meta device here, where it has no values to compute with.
DEFAULTS: dict[str, Callable[[], Any]] = {
    "usual": lambda: None,
    "bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
    "float16": lambda: torch.set_default_dtype(torch.float16),
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "device": lambda: torch.set_default_device("meta"),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
}


def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 300, (2, 9), generator=generator, dtype=torch.int64, device="cpu")


def logits(model: Any, policy: Any, **options: Any) -> torch.Tensor:
    mask = torch.ones(2, 9, dtype=torch.int64, device="cpu")
    mask[0, :3] = 0
    with torch.no_grad(), attnrb.patch(model, policy):
        found: torch.Tensor = model(ids(), attention_mask=mask, **options).logits
    return found


@pytest.mark.parametrize("default", [name for name in DEFAULTS if name != "usual"])
class TestDefaults:
    def test_forward(self, default: str) -> None:
        model = tiny_model()
        expected = logits(model, POLICY)
        DEFAULTS[default]()
        assert torch.equal(logits(model, POLICY), expected)
        assert torch.allclose(logits(model, POLICY, output_attentions=True), expected, atol=1e-4)

    def test_a_patch_from_before(self, default: str) -> None:
        model = tiny_model()
        expected = logits(model, POLICY)
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[0, :3] = 0
        with torch.no_grad(), attnrb.patch(model, POLICY):
            DEFAULTS[default]()
            assert torch.equal(model(ids(), attention_mask=mask).logits, expected)

    def test_learnt_gains(self, default: str, tmp_path: Path) -> None:
        DEFAULTS[default]()
        with torch.device("cpu"):
            model = tiny_model().float()
        learned = LearnedGains(model, POLICY)
        assert (learned.gains.dtype, learned.gains.device.type) == (torch.float32, "cpu")
        with attnrb.patch(model, learned):
            model(ids(), labels=ids()).loss.backward()
        assert learned.gains.grad is not None and bool(learned.gains.grad.any())
        again = LearnedGains.load(learned.save(tmp_path))
        assert torch.equal(again.matrix(), learned.matrix())
        assert again.matrix().dtype == torch.float32

    def test_training(self, default: str) -> None:
        def gradient(model: Any) -> torch.Tensor:
            with attnrb.patch(model, POLICY):
                model(ids(), labels=ids()).loss.backward()
            found: torch.Tensor = model.model.layers[1].self_attn.q_proj.weight.grad
            return found

        expected, model = gradient(tiny_model()), tiny_model()
        DEFAULTS[default]()
        assert torch.equal(gradient(model), expected)

    def test_studies(self, default: str) -> None:
        tokenizer, model = tiny_tokenizer(), tiny_model()

        def study() -> tuple[Any, ...]:
            found = compare(model, tokenizer, TEXT, POLICY, max_new_tokens=4)
            report = analyze(model, tokenizer, [TEXT], compare=POLICY)
            means = [run.mean("entropy") for run in report.runs]
            return found.plain.token_ids, found.rebalanced.token_ids, found.first_key_rebalanced, means

        expected = study()
        DEFAULTS[default]()
        assert study() == expected

    def test_functions(self, default: str) -> None:
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(1, 4, 5, 8, generator=generator, **CPU)  # type: ignore[call-overload]
        key = torch.randn(1, 2, 5, 8, generator=generator, **CPU)  # type: ignore[call-overload]

        def results(query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
            output, lse, found = functional.source_attention(query, key, key, threshold=0.1)
            weights = torch.ones(1, 4, 5, 5, dtype=query.dtype, device="cpu") / 5
            return [
                output,
                lse,
                functional.rebalanced_attention(query, key, key, found, 0.5, visibility=attnrb.Visibility(window=3)),
                functional.rebalanced_attention(query, key, key, found, [0.5, 0.1, 0.2, 0.3], normalize=True),
                functional.received_attention(query, key),
                functional.rebalance(weights, functional.outlier_mask(weights, 0.1), [0.5, 0.1, 0.2, 0.3]),
            ]

        operands = [(query, key), (query.double(), key.double()), (query.bfloat16(), key.bfloat16())]
        expected = [results(*pair) for pair in operands]
        DEFAULTS[default]()
        for wanted, pair in zip(expected, operands, strict=True):
            for mine, theirs in zip(results(*pair), wanted, strict=True):
                assert mine.dtype == theirs.dtype
                assert torch.equal(mine, theirs)

    def test_the_lm_eval_model(self, default: str) -> None:
        pytest.importorskip("lm_eval")
        from attnrb.evaluation import AttnrbLM
        from lm_eval.api.instance import Instance

        model, tokenizer = tiny_model(), tiny_tokenizer()
        requests = [Instance("loglikelihood", {}, ("the quick", " fox"), 0)]

        def score() -> Any:
            lm = AttnrbLM(model, tokenizer=tokenizer, policy=POLICY, batch_size=2)
            try:
                return lm.loglikelihood(requests, disable_tqdm=True), lm.digest()
            finally:
                lm._patch.remove()

        expected = score()
        DEFAULTS[default]()
        assert score() == expected


def test_inference_mode_around_everything() -> None:
    expected = logits(tiny_model(), POLICY)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.inference_mode():
        assert torch.equal(logits(model, POLICY), expected)
        compare(model, tokenizer, TEXT, POLICY, max_new_tokens=3)
        analyze(model, tokenizer, [TEXT], compare=POLICY)
    assert torch.equal(logits(model, POLICY), expected)
    with torch.inference_mode():
        made = tiny_model()
    assert torch.equal(logits(made, POLICY), expected)


def test_anomaly_detection() -> None:
    model = tiny_model()
    with torch.autograd.set_detect_anomaly(True), attnrb.patch(model, POLICY):
        model(ids(), labels=ids()).loss.backward()
    assert bool(torch.isfinite(model.lm_head.weight.grad).all())


FACTORIES = {"tensor", "zeros", "ones", "full", "empty", "rand", "randn", "randint", "linspace", "eye", "arange"}


def bare_factories(source: str) -> list[int]:
    """Lines on which a tensor is made without a device, or without a dtype where it does not follow from integers."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (
            isinstance(node.func.value, ast.Name) and node.func.value.id == "torch" and node.func.attr in FACTORIES
        ):
            continue
        named = {keyword.arg for keyword in node.keywords}
        spread = None in named  # as in **made
        if not spread and ("device" not in named or ("dtype" not in named and node.func.attr != "arange")):
            lines.append(node.lineno)
    return lines


def test_no_tensor_is_made_without_dtype_and_device() -> None:
    assert bare_factories("torch.zeros(3, dtype=x)\ntorch.ones(2, dtype=x, device=y)\ntorch.arange(3)") == [1, 3]
    found = {str(path.relative_to(PACKAGE)): bare_factories(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines} == {}
