"""Ranking heads by one backward pass, against autograd through transformers' own attention in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attnrb
from attnrb.policies.parse import parse_policy
from attnrb.policies.profile import bundled_profiles
from saved_tiny_model import LAYERS, tiny_model, tiny_tokenizer

HEADS = 4
TEXTS = (
    ("the quick brown ((fox jumps)) over the lazy", " dog"),
    ("((a slow green turtle)) walks under", " the old stone bridge"),
    ("the ((dog)) walks while ((the fox jumps over)) it under the", " bridge"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> list[tuple[attnrb.Marked, str]]:
    return [(attnrb.mark(tokenizer, text), answer) for text, answer in TEXTS]


def oracle(model: Any, tokenizer: Any, examples: Any, rows: str, dtype: torch.dtype) -> torch.Tensor:
    """-∂loss/∂gain ``[L, H]``: one example at a time, each layer given a mask of its own with the biases in it."""
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation("eager")
    gains = torch.zeros(LAYERS, HEADS, dtype=dtype, requires_grad=True)
    masks: list[torch.Tensor] = []

    def put(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": masks[module.layer_idx]}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(put, with_kwargs=True)
    losses = []
    for marked, answer in examples:
        prompt, answer_ids = marked.inputs["input_ids"][0].tolist(), tokenizer(answer)["input_ids"]
        ids = prompt + answer_ids
        count = len(ids)
        covered = torch.zeros(count, dtype=dtype)
        for span in marked.spans[0]:
            covered[span.start : span.end] += 1
        last = max(span.end for span in marked.spans[0])
        first = {"all": 0, "after": last, "last": len(prompt) - 1}[rows]
        heeds = (torch.arange(count) >= first).to(dtype)
        causal = torch.full((count, count), torch.finfo(dtype).min, dtype=dtype).triu(1)
        edit = heeds[:, None] * covered[None, :]
        masks[:] = [(causal + gains[layer][:, None, None] * edit)[None] for layer in range(LAYERS)]
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        found = [logits[len(prompt) - 1 + place, token] for place, token in enumerate(answer_ids)]
        losses.append(-torch.stack(found).mean())
    [gradient] = torch.autograd.grad(torch.stack(losses).mean(), gains)
    return -gradient.double()


@pytest.mark.parametrize("rows", ["after", "all", "last"])
def test_scores_are_the_gradient_at_no_gain(model: Any, tokenizer: Any, examples: Any, rows: str) -> None:
    expected = oracle(model, tokenizer, examples, rows, torch.float64)
    own = oracle(model, tokenizer, examples, rows, torch.float32)
    profile = attnrb.profile_heads(model, tokenizer, attnrb.Emphasis(rows=rows), examples, keep=3)
    found = torch.tensor(profile.scores, dtype=torch.float64)
    # transformers' own float32 strays as far, through as many roundings in another order.
    assert (found - expected).abs().max() <= 4 * (own - expected).abs().max()
    order = expected.flatten().argsort(descending=True)
    assert profile.ranking == tuple((int(place) // HEADS, int(place) % HEADS) for place in order)
    assert sum(len(heads) for heads in profile.chosen.values()) == 3


def test_padding_on_the_left_changes_nothing(model: Any, tokenizer: Any, examples: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = "</s>", "left"
    padded = [(attnrb.mark(tokenizer, text, padding="max_length", max_length=60), answer) for text, answer in TEXTS]
    assert padded[0][1] == examples[0][1]
    assert padded[0][0].inputs["input_ids"].shape[1] == 60
    one = attnrb.profile_heads(model, tokenizer, None, padded, keep=3)
    other = attnrb.profile_heads(model, tokenizer, None, examples, keep=3)
    assert one.scores == other.scores


def test_leaves_the_model_as_it_was(model: Any, tokenizer: Any, examples: Any) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps: list[str] = []
    profile = attnrb.profile_heads(model, tokenizer, None, examples, progress=steps.append)
    assert attnrb.patched(model) is None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert steps
    assert profile.keep == LAYERS * HEADS  # 32 is more than it has
    assert profile.about["examples"] == len(TEXTS)


def test_saved_and_loaded_and_used(model: Any, tokenizer: Any, examples: Any, tmp_path: Path) -> None:
    profile = attnrb.profile_heads(model, tokenizer, None, examples, keep=5)
    loaded = attnrb.HeadProfile.load(profile.save(tmp_path / "heads.json"))
    assert loaded == profile
    assert loaded.about == profile.about
    policy = attnrb.Emphasis(heads=str(tmp_path / "heads.json"))
    assert policy == attnrb.Emphasis(heads=profile)
    with attnrb.patch(model, policy) as patched:
        assert patched.generate(examples[0][0], max_new_tokens=2).shape[0] == 1


def test_a_profile_of_another_model_is_refused(model: Any) -> None:
    profile = attnrb.HeadProfile([[0.0] * HEADS] * (LAYERS + 1), keep=2)
    with pytest.raises(ValueError, match="this profile is of a model with 4 layers of 4 heads, this one has 3 of 4"):
        attnrb.patch(model, attnrb.Emphasis(heads=profile))
    with pytest.raises(ValueError, match="30 layers of 9 heads"):
        attnrb.patch(model, attnrb.Emphasis(heads="smollm2-135m-instruct"))


def test_what_is_no_profile_is_refused() -> None:
    options = attnrb.HeadProfile([[0.5] * HEADS] * LAYERS, keep=2).to_dict()
    assert attnrb.HeadProfile.from_dict(options).keep == 2
    for changed, message in (({"version": 99}, "this attnrb reads version"), ({"format": "x"}, "expected a mapping")):
        with pytest.raises(ValueError, match=f"profile: {message}"):
            attnrb.HeadProfile.from_dict(options | changed)


def test_bundled_profiles_have_names() -> None:
    assert "smollm2-135m-instruct" in bundled_profiles()
    for name in bundled_profiles():
        profile = attnrb.HeadProfile.load(name)
        assert profile.about["command"].startswith("attnrb profile")
        assert parse_policy(f"emphasis(heads={name})") == attnrb.Emphasis(heads=profile)
    with pytest.raises(FileNotFoundError, match="smollm2-135m-instruct"):
        attnrb.HeadProfile.load("nobody")


def test_what_cannot_be_profiled(model: Any, tokenizer: Any, examples: Any) -> None:
    marked, answer = examples[0]
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (None, [], ValueError, "examples: expected at least one"),
        (None, "text", TypeError, "examples: expected a list of pairs"),
        (None, [marked], TypeError, r"examples\[0\]: expected a pair"),
        (None, [examples[0], ("text", answer)], TypeError, r"examples\[1\]: expected what attnrb.mark returns"),
        (None, [(marked, "")], ValueError, r"examples\[0\]"),
        (None, [(attnrb.mark(tokenizer, ["((a)) b", "((c)) d"], padding=False, return_tensors=None), answer)],
         ValueError, "expected one text in each"),
        (None, [(attnrb.mark(tokenizer, "no span"), answer)], ValueError, "without a strength of its own"),
        (None, [(attnrb.mark(tokenizer, "((the dog:4)) walks"), answer)], ValueError, "without a strength of its own"),
        (attnrb.Rebalance(), examples, TypeError, "policy: expected an attnrb.Emphasis or None, got Rebalance"),
        (attnrb.Emphasis(heads=[1]), examples, ValueError, "policy: expected one without heads"),
        (attnrb.Emphasis(share=0.5), examples, ValueError, "policy: expected one without share"),
    ]  # fmt: skip
    for policy, given, error, message in cases:
        with pytest.raises(error, match=message):
            attnrb.profile_heads(model, tokenizer, policy, given)
    with pytest.raises(ValueError, match="keep: expected 1 to 12"):
        attnrb.profile_heads(model, tokenizer, None, examples, keep=13)
    with pytest.raises(ValueError, match="training mode"):
        attnrb.profile_heads(model.train(), tokenizer, None, examples)
    assert attnrb.patched(model) is None
