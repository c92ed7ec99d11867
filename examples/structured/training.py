"""Trains one run with transformers' Trainer, so that a kill at any moment costs the steps since the last checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import attnrb
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from structured.data import Blocks
from structured.settings import Run, Settings

_COMPLETE = "complete"  # a file that stands in finished checkpoints only

Tell = Callable[[str, int, int, float | None, float | None], None]
"""Of progress: what runs, steps done, steps in all, the last training loss, the last held-out loss."""


class Losses(NamedTuple):
    """Mean cross-entropy, in nats a token."""

    training: list[tuple[int, float]]
    """After each step, of its batch."""
    held_out: list[tuple[int, float]]
    """After some steps, of all held-out blocks."""


class Trained(NamedTuple):
    """What a run leaves behind."""

    model: Any
    """The tuned model, adapters merged into it, not patched."""
    gains: attnrb.LearnedGains | None
    losses: Losses


def train(
    model: Any, run: Run, settings: Settings, training: Blocks, held_out: Blocks, folder: Path, tell: Tell
) -> Trained:
    """Train a freshly loaded model, from the last checkpoint in the folder on, and save what was trained there."""
    set_seed(run.seed)
    learned = attnrb.LearnedGains(model, settings.config) if settings.train == "gains" else None
    if settings.train == "lora":
        model = _with_adapter(model, settings.rank)
    steps = settings.step_count(len(training))
    options = _options(settings, run.seed, steps, folder / "checkpoints")
    kinds: dict[str, Any] = {"model": model, "args": options, "train_dataset": training, "eval_dataset": held_out}
    trainer = Trainer(**kinds) if learned is None else _GainsTrainer(learned, settings.rate, **kinds)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Teller(run.name, steps, tell))

    with contextlib.ExitStack() as stack:
        if run.arm != "plain":
            stack.enter_context(attnrb.patch(model, settings.config if learned is None else learned))
        checkpoint = last_checkpoint(folder / "checkpoints")
        if checkpoint is not None and _step(checkpoint) >= steps:
            # All steps were done when it was killed; Trainer would take one more.
            trainer._load_from_checkpoint(str(checkpoint))
            history = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["log_history"]
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            history = trainer.state.log_history
    _save(model, learned, run, settings, folder)
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # without the autocast of training
    tuned = model.merge_and_unload() if settings.train == "lora" else model
    return Trained(tuned.eval(), learned, _losses(history))


@torch.no_grad()
def evaluate(model: Any, applied: attnrb.Policy | None, settings: Settings, blocks: Blocks) -> float:
    """The loss of a model, as the evaluations during training measure it, re-balanced as `applied` says."""
    total = 0.0
    with attnrb.patch(model, applied) if applied is not None else contextlib.nullcontext(), _computing(settings):
        for batch in torch.split(blocks.tokens, settings.batch_size):
            total += float(model(batch, labels=batch, use_cache=False).loss) * len(batch)
    return total / len(blocks)


def _computing(settings: Settings) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bfloat16")


def _options(settings: Settings, seed: int, steps: int, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        data_seed=seed,
        bf16=settings.precision == "bfloat16",
        use_cpu=True,  # the gradients for CUDA have not run on a GPU yet (docs/cuda.md)
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=math.ceil(steps / max(settings.evaluations, 1)),
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=max(1, min(25, steps // 4)),
        save_total_limit=2,  # the newest may be half-written
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=False,
        dataloader_num_workers=0,
    )


def _with_adapter(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def _save(model: Any, learned: attnrb.LearnedGains | None, run: Run, settings: Settings, folder: Path) -> None:
    """Write adapter, model or gains, and the configuration that it is used with: all of it as safetensors and JSON."""
    if learned is not None:
        learned.save(folder)
        return
    place = folder / ("adapter" if settings.train == "lora" else "model")
    model.save_pretrained(place)
    if run.arm != "plain":
        settings.config.save_pretrained(place)


def _losses(history: Sequence[dict[str, Any]]) -> Losses:
    def curve(name: str) -> list[tuple[int, float]]:
        return [(entry["step"], entry[name]) for entry in history if name in entry]

    return Losses(curve("loss"), curve("eval_loss"))


# ----------------------------------------------------------------------------------------------------- checkpoints


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was finished. Those that a kill cut short are removed."""
    found = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / _COMPLETE).exists():
            found.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(found, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class _Teller(TrainerCallback):
    """Marks finished checkpoints, and tells how far the run is."""

    def __init__(self, name: str, steps: int, tell: Tell) -> None:
        self.name, self.steps, self.tell = name, steps, tell
        self.loss: float | None = None
        self.held_out: float | None = None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)
        self.held_out = (logs or {}).get("eval_loss", self.held_out)
        self.tell(self.name, state.global_step, self.steps, self.loss, self.held_out)


class _GainsTrainer(Trainer):
    """Trains gains, which are no part of the model: its checkpoints hold them and not the frozen weights."""

    def __init__(self, learned: attnrb.LearnedGains, rate: float, **others: Any) -> None:
        optimizer = torch.optim.AdamW(learned.parameters(), lr=rate, weight_decay=0.0)
        # Trainer sets the gradients of the model to zero, and of nothing else.
        optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
        super().__init__(optimizers=(optimizer, None), **others)
        self.learned = learned

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.learned.save(output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        loaded = attnrb.LearnedGains.load(resume_from_checkpoint)
        self.learned.load_state_dict(loaded.state_dict())
