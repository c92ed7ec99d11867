"""Fine-tune a model on structured records, with and without re-balancing, and see what becomes of its attention.

    python examples/finetune_structured.py                      # LoRA on the cards beside this file, both arms
    python examples/finetune_structured.py --train gains        # only the gains learn
    python examples/finetune_structured.py --data MINE.jsonl --model FOLDER --train full

All arms see the same data in the same order from the same start. The study is kept in a folder (--output); stop it at
any moment, and the same command continues. It ends with ``report.html`` and ``report.json`` there. Needs the extras
``cli``, ``analysis``, ``eval`` and ``train``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from attnrb.cli import options
from attnrb.cli.console import errors, quiet_transformers, user_errors
from attnrb.cli.console import output as output_console
from attnrb.cli.loading import Model, Threads, set_threads
from rich.text import Text

_TRAINING = "Training"
_DATA = "Data"
_REPORT = "Report"
_CARDS = Path(__file__).with_name("cards.jsonl")


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.command()
@options.takes_policy
def main(
    *,
    train: Annotated[str, typer.Option(help="What learns: lora, full or gains.", rich_help_panel=_TRAINING)] = "lora",
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="plain or rebalanced; may be given again. With gains there is one arm.",
            show_default="both",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder of the study.", show_default="finetune-TRAIN", rich_help_panel=_REPORT
        ),
    ] = None,
    data: Annotated[
        Path,
        typer.Option(
            help="JSON lines: objects with a field text, or of fields, each a line of a card.",
            show_default="the cards beside this script",
            rich_help_panel=_DATA,
        ),
    ] = _CARDS,
    limit: Annotated[
        int | None, typer.Option(min=1, help="How many records to train on.", show_default="all", rich_help_panel=_DATA)
    ] = None,
    held_out: Annotated[int, typer.Option(min=1, help="Records that are not trained on.", rich_help_panel=_DATA)] = 100,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a block.", rich_help_panel=_DATA)] = 256,
    steps_: Annotated[
        int | None, typer.Option("--steps", min=1, help="Steps of the optimizer.", rich_help_panel=_TRAINING)
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Times that the data is read.", show_default="1, unless --steps", rich_help_panel=_TRAINING),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Blocks at a time.", rich_help_panel=_TRAINING)] = 2,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches in a step.", rich_help_panel=_TRAINING)] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="After the warm-up.", show_default="lora 5e-4, full 2e-5, gains 1e-2", rich_help_panel=_TRAINING
        ),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA adapters.", rich_help_panel=_TRAINING)] = 8,
    precision: Annotated[
        str,
        typer.Option(help="bfloat16 (weights stay float32, products do not) or float32.", rich_help_panel=_TRAINING),
    ] = "bfloat16",
    seed: Annotated[int, typer.Option(min=0, help="The first seed.", rich_help_panel=_TRAINING)] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, help="How many seeds to train each arm with.", rich_help_panel=_TRAINING)
    ] = 1,
    evaluations: Annotated[
        int, typer.Option(min=1, help="Times the held-out loss is measured in a run.", rich_help_panel=_REPORT)
    ] = 8,
    analysis_texts: Annotated[
        int, typer.Option(min=0, help="Held-out texts whose attention is measured.", rich_help_panel=_REPORT)
    ] = 8,
    model: Model = None,
    threads: Threads = None,
    policy: options.PolicyChoice,
) -> None:
    """Fine-tune a model on structured records, with and without re-balancing, and report what became of attention."""
    with user_errors():
        from structured.data import read_records
        from structured.page import sentences
        from structured.progress import training_progress
        from structured.report import collect, write_report
        from structured.settings import Run, Settings, arms_of, claim
        from structured.study import locked, study

        settings = Settings(
            train=train,
            model=model,
            data=data,
            config=policy.policy(),
            steps=steps_,
            epochs=epochs,
            limit=limit,
            held_out=held_out,
            length=length,
            batch_size=batch_size,
            accumulate=accumulate,
            learning_rate=learning_rate,
            rank=rank,
            precision=precision,
            evaluations=evaluations,
            analysis_texts=analysis_texts,
        )
        arms = arms_of(train, arm)
        runs = [Run(each, seed + number) for number in range(seeds) for each in arms]
        records = read_records(data, held_out=held_out, limit=limit, seed=0)
        folder = output or Path(f"finetune-{train}")
        set_threads(threads)
        try:
            with locked(folder), training_progress() as (say, tell):
                claim(folder, settings.identity(records.digest))
                quiet_transformers()
                study(settings, runs, records, folder, say, tell, lambda: write_report(folder))
                page = write_report(folder)
        except KeyboardInterrupt:
            errors().print(Text(f"stopped; the same command continues from {folder}.", style="red"), soft_wrap=True)
            raise typer.Exit(130) from None
    for sentence in sentences(collect(folder)):
        output_console().print(Text(f"{sentence}."))
    errors().print(Text(f"The report is in {page}."), soft_wrap=True)


if __name__ == "__main__":
    app()
