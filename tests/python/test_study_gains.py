"""The study of gains: what is learnt, its controls, and adapters of some heads alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("scipy", reason="studies need the package scipy")
pytest.importorskip("statsmodels", reason="studies need the package statsmodels")

import attnrb
import torch
from attnrb.evaluation.runfile import RunFile
from attnrb.policies.base import model_shape
from attnrb.studies.adapters import Adapter, adapted, mask_heads, output_projections
from attnrb.studies.answers import answer_row
from attnrb.studies.arms import PLAIN, Arm, LeakError
from attnrb.studies.candidates import candidate_scores
from attnrb.studies.gains import ATTRIBUTED, LEARNERS, LORA, attributed, learn
from attnrb.studies.material import study_items
from attnrb.studies.plan import StudyPlan
from attnrb.studies.study import Study, first_key_marked
from attnrb.studies.study_run import study_report
from saved_tiny_model import LAYERS, tiny_model, tiny_tokenizer

HEADS, WIDTH = 4, 8
PLAN = StudyPlan(study="gains", items=2, examples=1, development=1, steps=2, keep=3)


def lines(path: Path) -> list[dict[str, Any]]:
    return [record for record in map(json.loads, path.read_text("utf-8").splitlines()) if "arm" in record]


def loss(model: Any, items: Any, policy: Any = None, adapter: Adapter | None = None, first_key: bool = False) -> float:
    """The mean cross-entropy of the right candidates, by the scoring that studies report with."""
    tokenizer = tiny_tokenizer()
    prompts = []
    for item in items:
        prompt = item.prompt(tokenizer, span="marked")
        rows = [answer_row(model, tokenizer, prompt, " " + word, "") for word in item.candidates]
        prompts.append([first_key_marked(row) for row in rows] if first_key else rows)
    with adapted(model, adapter):
        if policy is None:
            found = candidate_scores(model, prompts)
        else:
            with attnrb.patch(model, policy) as patched:
                found = candidate_scores(model, prompts, patched)
    return float(-sum(torch.tensor(each, dtype=torch.float64).log_softmax(0)[0] for each in found))


def test_learnt_gains_stand_beside_controls_and_carry_what_they_saw(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    path = tmp_path / "run.jsonl"
    report = study_report(tiny_model(), tiny_tokenizer(), PLAN, path, model_name="tiny")
    assert report is not None
    learnt = {f"gains on {kind}, seed 0" for kind in LEARNERS} | {f"{LORA}, seed 0"}
    by_gradient = {f"outliers, heads by {ATTRIBUTED[0]}", f"outliers, heads by {ATTRIBUTED[1]}, seed 0"}
    some = {f"{LORA}, 3 heads ranked best, seed 0", f"{LORA}, 3 heads drawn by chance (control), seed 0"}
    some.add("gains on outliers, 3 heads ranked best, seed 0")
    assert {each["arm"] for each in report["results"]} == {PLAIN, *learnt, *some, *by_gradient}
    assert report["chosen_on"] == 2 * len(PLAN.tasks)
    policies = {each["arm"]: attnrb.Policy.from_dict(each["policy"]) for each in lines(path) if "policy" in each}
    outliers, control = policies["gains on outliers, seed 0"], policies["gains on every key (control), seed 0"]
    assert isinstance(outliers, attnrb.LearnedGains) and isinstance(control, attnrb.LearnedGains)
    assert outliers.gains.shape == control.gains.shape and outliers.layers == control.layers
    assert control.gains.abs().max() > 0 and not torch.equal(outliers.gains, control.gains)
    oracle = Arm("oracle", policy=control, tasks=("conflict",))
    held_out = study_items("conflict", 2)
    with RunFile(tmp_path / "oracle.jsonl", {}) as file:
        study = Study(tiny_model(), tiny_tokenizer(), PLAN, file)
        study.adapters["adapter"] = Adapter(study.model)
        for each in (oracle, Arm("oracle", adapter="adapter", tasks=("conflict",))):
            with pytest.raises(LeakError):
                study.ask_arms([each], frozenset({held_out[0].fingerprint}))
        assert not file.records
    before = lines(path)
    study_report(tiny_model(), tiny_tokenizer(), PLAN, path, model_name="tiny")
    assert lines(path) == before


@pytest.mark.parametrize("kind", [*LEARNERS, LORA])
def test_learning_lowers_the_loss_of_what_is_learnt_from(kind: str) -> None:
    model, items = tiny_model(), study_items("story", 4, split="development")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learned = learn(model, tiny_tokenizer(), items, kind, steps=15, seed=0)
    first = kind == "first key"
    adapter = learned if isinstance(learned, Adapter) else None
    policy = None if isinstance(learned, Adapter) else learned
    assert loss(model, items, policy, adapter, first) < loss(model, items)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", [*LEARNERS, LORA])
def test_only_chosen_heads_are_trained(kind: str) -> None:
    model, items = tiny_model(), study_items("story", 4, split="development")
    shape = model_shape(model)
    scores = [[float(layer * head) for head in range(shape.heads)] for layer in range(shape.layers)]
    heads = attnrb.HeadProfile(scores, keep=2)
    learned = learn(model, tiny_tokenizer(), items, kind, steps=3, seed=0, heads=heads)
    chosen = {(layer, head) for layer, mine in heads.chosen.items() for head in mine}
    assert len(chosen) == 2
    if isinstance(learned, Adapter):
        moved = {
            (layer, int(column) // (mask.numel() // shape.heads))
            for layer, mask in learned.mask.items()
            for column in (learned.down[str(layer)] * mask).detach().any(0).nonzero()
        }
    else:
        moved = {(learned.layers[row], int(head)) for row, head in learned.gains.detach().nonzero().tolist()}
    assert moved == chosen


def test_an_unknown_kind_is_refused() -> None:
    model, items = tiny_model(), study_items("story", 1, split="development")
    with pytest.raises(ValueError, match="kind: expected one of"):
        learn(model, tiny_tokenizer(), items, "luck", steps=1, seed=0)
    with pytest.raises(ValueError, match="how: expected one of"):
        attributed(model, tiny_tokenizer(), items, "luck", keep=1, seed=0)


def test_attribution_takes_the_largest_gradients_and_the_control_as_many_heads() -> None:
    model, tokenizer, items = tiny_model(), tiny_tokenizer(), study_items("story", 3, split="development")
    best = attributed(model, tokenizer, items, ATTRIBUTED[0], keep=3, seed=0)
    chance = attributed(model, tokenizer, items, ATTRIBUTED[1], keep=3, seed=0)
    for each in (best, chance):
        assert int((each.gains != 0).sum()) == 3 and float(each.gains.abs().max()) == pytest.approx(0.3)
    # By central differences, whose error is of the order of the square of their step.
    step, slopes = 1e-2, torch.zeros_like(best.gains)
    for row in range(slopes.shape[0]):
        for head in range(HEADS):
            probe = attributed(model, tokenizer, items, ATTRIBUTED[0], keep=1, seed=0)
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    probe.gains.zero_()[row, head] = sign * step
                sides.append(loss(model, items, probe))
            slopes[row, head] = (sides[0] - sides[1]) / (2 * step)
    largest = slopes.abs().flatten().topk(3).indices
    assert set(best.gains.flatten().nonzero().flatten().tolist()) == set(largest.tolist())
    assert torch.equal(best.gains.flatten()[largest].sign(), -slopes.flatten()[largest].sign())


def test_an_adapter_is_lora_of_the_projection_behind_attention() -> None:
    model = tiny_model()
    adapter = Adapter(model, rank=2, heads={1: [0, 3]}, seed=1)
    with torch.no_grad():
        for each in adapter.up.values():
            each.normal_()
    read = Adapter.from_dict(json.loads(json.dumps(adapter.to_dict())))
    ids = torch.arange(2, 14)[None]
    changed = tiny_model()
    with torch.no_grad():
        down = adapter.down["1"] * adapter.mask[1]
        output_projections(changed)[1].weight += adapter.up["1"] @ down
        expected = changed(ids).logits
        plain = model(ids).logits
        with adapted(model, adapter):
            found = model(ids).logits
        with adapted(model, read):
            again = model(ids).logits
        assert torch.equal(model(ids).logits, plain)
    assert list(adapter.down) == ["1"]
    columns = (adapter.up["1"] @ down).abs().sum(0).reshape(HEADS, WIDTH).sum(1)
    assert [bool(each > 0) for each in columns] == [True, False, False, True]
    # The same float32 products, summed in another order; numbers are rounded to seven digits in between.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-4)
    assert float((found - plain).abs().max()) > 1e-2


def test_peft_trains_the_columns_of_chosen_heads_alone() -> None:
    peft = pytest.importorskip("peft", reason="LoRA by PEFT needs the package peft")
    model = tiny_model()
    before = {layer: each.weight.clone() for layer, each in output_projections(model).items()}
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"], lora_alpha=4))
    profile = attnrb.HeadProfile([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]], 2)
    assert mask_heads(tuned, profile) == 2 * WIDTH
    optimizer = torch.optim.AdamW([each for each in tuned.parameters() if each.requires_grad], lr=0.1, weight_decay=0.1)
    ids = torch.arange(2, 14)[None]
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        found = tuned(ids, labels=ids).loss
        losses.append(float(found))
        found.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    merged = tuned.merge_and_unload()
    chosen = {0: [0], 1: [], 2: [2]}
    for layer, each in output_projections(merged).items():
        moved = (each.weight - before[layer]).abs().sum(0).reshape(HEADS, WIDTH).sum(1)
        assert [head for head in range(HEADS) if moved[head] > 0] == chosen[layer]
    assert len(before) == LAYERS
    with pytest.raises(ValueError, match="peft_model: expected LoRA"):
        mask_heads(tiny_model(), profile)
