"""Learnt gains: they start as the schedule, get the oracle's gradients, train alone, and come back from their file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

import transformers
from attnrb import LearnedGains, RebalanceConfig
from dense_oracle import DenseOracle, linear_gains
from safetensors.torch import save_file
from test_training_patch import Texts, trainable
from tiny_models import LAYERS, tiny, tokens
from torch import Tensor

CONFIG = RebalanceConfig(alpha=0.5, threshold=0.05)


def logits(model: Any, config: Any, batch: Tensor) -> Tensor:
    with torch.no_grad(), attnrb.patch(model, config):
        found: Tensor = model(batch).logits
    return found


@pytest.mark.parametrize(
    "options", [{}, {"normalize": True}, {"heads": [1, 3]}, {"layers": [2, 4]}, {"boost_all": True}]
)
def test_they_start_as_the_schedule(options: dict[str, Any]) -> None:
    model, batch = tiny("llama"), tokens(2, 30)
    config = RebalanceConfig(alpha=0.5, threshold=0.05, **options)
    learned = LearnedGains(model, config)
    assert torch.equal(logits(model, learned, batch), logits(model, config, batch))
    scheduled = [row or [0.0] * 4 for row in config.layer_gains(LAYERS, 4)]
    assert torch.equal(learned.matrix(), torch.tensor(scheduled))
    assert learned.layers == tuple(config.layers or range(1, LAYERS)), "the last one too, though it starts at 0"
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_profile_chooses_the_heads_that_have_one() -> None:
    model, batch = tiny("llama"), tokens(2, 30)
    scores = [[0.0] * 4 for _ in range(LAYERS)]
    scores[0][1], scores[2][3], scores[3][0] = 3.0, 2.0, 1.0
    profile = attnrb.HeadProfile(scores, 3)
    learned = LearnedGains(model, CONFIG, heads=profile)
    # The profile's head in the source layer has no gain.
    assert learned.layers == (2, 3)
    assert learned.chosen.tolist() == [[False, False, False, True], [True, False, False, False]]
    chosen = RebalanceConfig(alpha=0.5, threshold=0.05, heads={2: [3], 3: [0]})
    assert torch.equal(logits(model, learned, batch), logits(model, chosen, batch))
    assert LearnedGains(model, CONFIG, heads=[1]).layers == tuple(range(1, LAYERS))
    with pytest.raises(ValueError, match="this profile is of a model with 2 layers"):
        LearnedGains(model, CONFIG, heads=attnrb.HeadProfile([[1.0] * 4] * 2, 1))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt_oss"])
def test_their_gradient_is_that_of_dense_autograd(architecture: str, normalize: bool) -> None:
    model, batch = trainable(architecture), tokens(2, 30)
    start = torch.tensor([[gain] * 4 for gain in linear_gains(LAYERS, 0.5)], dtype=torch.float64).requires_grad_()
    config = RebalanceConfig(alpha=0.5, threshold=0.05, normalize=normalize)
    learned = LearnedGains(model, config)
    oracle = DenseOracle(list(start), threshold=0.05, normalize=normalize)
    with oracle.attached(model):
        model(batch, labels=batch, use_cache=False).loss.backward()
    with attnrb.patch(model, learned):
        model(batch, labels=batch, use_cache=False).loss.backward()
    assert start.grad is not None
    assert learned.gains.grad is not None
    expected = start.grad[1:].float()
    assert (expected != 0).all(), "the last layer too"
    torch.testing.assert_close(learned.gains.grad, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_they_train_alone(checkpointing: bool | None) -> None:
    model, batch = trainable(), tokens(4, 24)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    learned = LearnedGains(model, RebalanceConfig(alpha=0.5, threshold=0.05, heads=[0, 2, 3]))
    start = learned.gains.detach().clone()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        if checkpointing:
            model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(learned.parameters(), lr=0.05, weight_decay=0.0)
    losses = []
    with attnrb.patch(model, learned) as patched:
        for _ in range(12):
            optimizer.zero_grad()
            loss = model(batch, labels=batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert patched.policy is learned
    assert losses[-1] < losses[0]
    moved = (learned.gains.detach() != start).all(0)
    assert moved.tolist() == [True, False, True, True], "a head that is left out keeps its 0"
    assert not learned.matrix()[:, 1].any()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_trainer_trains_them(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = trainable()
    learned = LearnedGains(model, CONFIG)
    start = learned.gains.detach().clone()
    options = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, report_to=[], save_strategy="no", use_cpu=True, per_device_train_batch_size=2
    )
    optimizer = torch.optim.AdamW(learned.parameters(), lr=0.05)
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
    used: list[Any] = []
    batches: list[Any] = []
    optimizer.register_step_pre_hook(lambda *_: used.append(learned.gains.grad.clone()))
    hook = model.register_forward_pre_hook(lambda _, args, batch: batches.append(batch), with_kwargs=True)
    with attnrb.patch(model, learned):
        transformers.Trainer(model=model, args=options, train_dataset=Texts(), optimizers=(optimizer, None)).train()
    assert (learned.gains != start).any()

    # Each step used the gradient of its own batch alone.
    hook.remove()
    assert len(used) == len(batches) == 3
    learned = LearnedGains(model, CONFIG)
    optimizer = torch.optim.AdamW(learned.parameters(), lr=0.05)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, 3)
    with attnrb.patch(model, learned):
        for gradient, batch in zip(used, batches, strict=True):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            torch.testing.assert_close(gradient, learned.gains.grad, rtol=1e-4, atol=1e-6)
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("place", ["folder", "gains.safetensors"])
def test_saved_and_loaded_they_do_the_same(tmp_path: Path, place: str) -> None:
    model, batch = tiny("llama"), tokens(2, 30)
    config = RebalanceConfig(threshold=0.05, heads={2: [0, 1], 4: [3]}, normalize=True)
    learned = LearnedGains(model, config)
    with torch.no_grad():
        learned.gains.normal_()
    file = learned.save(tmp_path / "new" / place)
    assert file.is_file()
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    loaded = LearnedGains.load(tmp_path / "new" / place)
    assert loaded.config == config
    assert loaded.layers == (2, 4)
    assert torch.equal(loaded.matrix(), learned.matrix())
    assert not loaded.gains.requires_grad
    assert LearnedGains.load(file, trainable=True).gains.requires_grad
    assert torch.equal(logits(model, loaded, batch), logits(model, learned, batch))
    assert not torch.equal(logits(model, loaded, batch), logits(model, config, batch))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    learned = LearnedGains(model, CONFIG)
    narrow = transformers.LlamaConfig(**{**model.config.to_dict(), "num_attention_heads": 2})
    other = transformers.LlamaForCausalLM(narrow)
    with pytest.raises(ValueError, match="model with 5 layers of 4 heads, this one has 5 of 2"):
        attnrb.patch(other, learned)
    with pytest.raises(TypeError, match=r"config: expected an attnrb\.Rebalance.*got float"):
        LearnedGains(model, 0.2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a model of transformers"):
        LearnedGains(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing to learn"):
        LearnedGains(model, RebalanceConfig(boost_all=True, normalize=True))
    with pytest.raises(NotImplementedError, match=r"attnrb\.patch\(model, learned\)"):
        learned(torch.zeros(1))
    with pytest.raises(FileNotFoundError, match="no such file"):
        LearnedGains.load(tmp_path)
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="no safetensors file, or a damaged one"):
        LearnedGains.load(tmp_path / "text.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected learnt gains"):
        LearnedGains.load(tmp_path / "other.safetensors")
    about = {"format": "attnrb.LearnedGains", "config": "{}", "layers": "[1, 2]", "model_layers": "5"}
    wrong = {"gains": torch.zeros(3, 4), "chosen": torch.ones(3, 4, dtype=torch.bool)}
    save_file(wrong, tmp_path / "wrong.safetensors", metadata=about)
    with pytest.raises(ValueError, match="do not fit together"):
        LearnedGains.load(tmp_path / "wrong.safetensors")
    save_file(wrong, tmp_path / "wrong.safetensors", metadata=about | {"config": '{"alpha": "much"}'})
    with pytest.raises(ValueError, match="damaged: alpha"):
        LearnedGains.load(tmp_path / "wrong.safetensors")
