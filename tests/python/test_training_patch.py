"""Training through a patched model: the same losses as a dense autograd oracle, in every way people train."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from dense_oracle import DenseOracle, linear_gains
from tiny_models import LAYERS, tiny, tokens
from torch import Tensor

CONFIG = attnrb.RebalanceConfig(alpha=0.5, threshold=0.05)
HERE = Path(__file__).parent


def oracle(**options: Any) -> DenseOracle:
    return DenseOracle(linear_gains(LAYERS, CONFIG.alpha), threshold=CONFIG.threshold, **options)


def trainable(architecture: str = "llama") -> Any:
    model = tiny(architecture).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def gradients(model: Any, *batches: Tensor) -> dict[str, Tensor]:
    """Gradients of the sum of the losses of these batches."""
    model.zero_grad()
    for batch in batches:
        model(batch, labels=batch, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "gpt_oss", "deepseek_v3", "llama4_text", "phi"])
def test_gradients_of_models_agree_with_dense_autograd(architecture: str) -> None:
    model, batch = trainable(architecture), tokens(2, 40)
    with oracle().attached(model):
        expected = gradients(model, batch)
    with attnrb.patch(model, CONFIG) as patched:
        found = gradients(model, batch)
    assert patched.stats.outliers > 0
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in found.items():
        # float32 products and sums on the way back through five layers, against attention in float64.
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-3, atol=2e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("normalize", [False, True])
def test_fifty_steps_follow_the_oracle(normalize: bool) -> None:
    """Fine-tuning with AdamW on a small text: the loss curves agree within 1e-4, relatively.

    At a rate of 1e-3 a model of random weights is chaotic, and curves that start a rounding apart end 2 % apart.
    """
    batches = [tokens(4, 24, seed=step % 5) for step in range(50)]
    config = attnrb.RebalanceConfig(alpha=0.5, threshold=0.05, normalize=normalize)
    curves = []
    for attach in (lambda m: oracle(normalize=normalize).attached(m), lambda m: attnrb.patch(m, config)):
        model = trainable()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        losses = []
        with attach(model):
            for batch in batches:
                optimizer.zero_grad()
                loss = model(batch, labels=batch, use_cache=False).loss
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        curves.append(torch.tensor(losses, dtype=torch.float64))
    expected, found = curves
    assert expected[-5:].mean() < 0.8 * expected[:5].mean(), "it learns"
    assert ((found - expected).abs() / expected).max() <= 1e-4


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_gradient_checkpointing_changes_no_bit(use_reentrant: bool, padded: bool) -> None:
    model, batch = trainable(), tokens(2, 30)
    mask = torch.ones_like(batch)
    if padded:
        mask[1, :7] = 0

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        model(batch, attention_mask=mask, labels=batch, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with attnrb.patch(model, CONFIG) as patched:
        expected = run()
        counted = patched.stats.outliers
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
        found = run()
        assert patched.stats.outliers == 2 * counted, "a layer that runs again is not counted again"
    assert_equal(found, expected)


@pytest.mark.parametrize("boost_all", [False, True])
def test_several_forwards_before_one_backward(boost_all: bool) -> None:
    model, first, second = trainable(), tokens(2, 30, seed=1), tokens(3, 22, seed=2)
    config = attnrb.RebalanceConfig(alpha=0.5, threshold=0.05, boost_all=boost_all)
    with attnrb.patch(model, config):
        expected = gradients(model, first, second)
        model.zero_grad()
        losses = [model(batch, labels=batch, use_cache=False).loss for batch in (first, second)]
        (losses[0] + losses[1]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_autocast_trains_in_bfloat16() -> None:
    """As near to the gradients in float32 as the oracle gets under autocast, whose attention is exact."""
    model, batch = trainable(), tokens(2, 30)

    def flat() -> Tensor:
        return torch.cat([gradient.flatten() for gradient in gradients(model, batch).values()])

    with oracle().attached(model):
        exact = flat()
        with torch.autocast("cpu", torch.bfloat16):
            allowed = 2 * (flat() - exact).norm()
    with attnrb.patch(model, CONFIG) as patched, torch.autocast("cpu", torch.bfloat16):
        found = flat()
    assert patched.stats.outliers > 0
    assert 0 < (found - exact).norm() <= allowed


def test_dropout_in_attention_raises() -> None:
    model = trainable()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with attnrb.patch(model, CONFIG):
        with pytest.raises(
            NotImplementedError, match=r"attention dropout of 0\.1.*set the model's attention dropout to 0"
        ):
            model(tokens(1, 8))
        model.eval()
        model(tokens(1, 8))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_training_step(backend: str) -> None:
    """Compiled and eager gradients differ by no more than twice what compiling the model changes unpatched."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs g++, which is not here")
    model, batch = trainable(), tokens(2, 30)

    def change() -> float:
        torch._dynamo.reset()
        expected = gradients(model, batch)
        model.zero_grad()
        torch.compile(model, backend=backend)(batch, labels=batch, use_cache=False).loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert found.keys() == expected.keys()
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        return max(float((found[name] - expected[name]).abs().max()) for name in expected) / largest

    plain = change()
    with attnrb.patch(model, CONFIG):
        assert change() <= 2 * plain + torch.finfo(torch.float32).eps


# ------------------------------------------------------------------------------------------------------- trainers


class Texts(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = tokens(1, 20, seed=index % 4)[0]
        return {"input_ids": row, "labels": row}


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = trainable()
    options = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=True,
    )
    with attnrb.patch(model, CONFIG) as patched:
        trainer = Trainer(model=model, args=options, train_dataset=Texts())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert patched.stats.forwards == 12
    assert patched.stats.outliers > 0


def test_peft_lora_trains_and_reaches_the_same_gradients() -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    batch = tokens(2, 30)
    model = peft.get_peft_model(trainable(), options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with oracle().attached(model.base_model.model):
        expected = gradients(model, batch)
    with attnrb.patch(model, CONFIG) as patched:
        found = gradients(model, batch)
    assert patched.stats.outliers > 0
    assert found.keys() == expected.keys()
    assert all("lora" in name for name in found)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-5 * largest)


def test_sft_trainer_of_trl(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from transformers import PreTrainedTokenizerFast

    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(97)}
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="w0", eos_token="w2", unk_token="w3")
    texts = [" ".join(f"w{int(t)}" for t in tokens(1, 12 + index % 5, seed=index)[0]) for index in range(8)]
    options = trl.SFTConfig(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    model = trainable()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with attnrb.patch(model, CONFIG) as patched:
        trainer = trl.SFTTrainer(
            model=model,
            args=options,
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
        )
        trainer.train()
    assert patched.stats.forwards == 3
    assert patched.stats.outliers > 0
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Each process trains on half of the batch: gradients are those of one process on all of it."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    program = [sys.executable, str(HERE / "train_two_processes.py"), str(tmp_path / "store")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["ddp: gradients agree", "fsdp: gradients agree"]
