"""``attnrb eval``: a model plain and re-balanced on the same items. ``attnrb lm-eval``: the harness' own command."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnrb.cli import files, options, running
from attnrb.cli.console import duration, errors, output, print_json, user_errors
from attnrb.cli.loading import Loading, takes_model
from attnrb.reports.printable import printable
from attnrb.text.reading import is_number, reads_as_number


@takes_model
@options.takes_policy
def evaluate(
    *,
    tasks: running.Tasks,
    data: running.Data = None,
    include_path: running.IncludePath = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Items of each task, and of each subject of MMLU.",
            show_default="all",
            rich_help_panel=running.ITEMS,
        ),
    ] = None,
    shuffle: Annotated[
        bool,
        typer.Option("--shuffle", help="Take them in an order drawn with --seed.", rich_help_panel=running.ITEMS),
    ] = False,
    prompting: Annotated[
        str, typer.Option(help="direct, cot (chain of thought) or both.", rich_help_panel=running.ASKING)
    ] = "direct",
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Computed tokens of the chain of thought, like 0,64,128: each is asked for by itself.",
            show_default=False,
            rich_help_panel=running.ASKING,
        ),
    ] = None,
    min_computed: Annotated[
        int, typer.Option(min=0, help="Computed tokens at least, without --budgets.", rich_help_panel=running.ASKING)
    ] = 0,
    max_computed: Annotated[
        int, typer.Option(min=0, help="Computed tokens at most, without --budgets.", rich_help_panel=running.ASKING)
    ] = 256,
    generated: running.Generated = False,
    shots: running.Shots = 0,
    chat: running.Chat = False,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            "-c",
            help="A policy in one word: default, alpha=0.3,normalize=true, emphasis(strength=8), a JSON object, a "
            ".json file or a folder; or a .yaml file of options. May be given again, and stands in place of the "
            "options below.",
            show_default=False,
            rich_help_panel="Policy",
        ),
    ] = None,
    policy: options.PolicyChoice,
    loading: Loading,
    seed: running.Seed = 0,
    batch_size: running.BatchSize = "auto",
    engine: running.Engine = "transformers",
    run: running.RunOption = None,
    json: files.JsonFile = None,
    csv: Annotated[
        Path | None,
        typer.Option(help="Every figure, as rows of a table.", show_default=False, rich_help_panel=files.PANEL),
    ] = None,
    html: files.HtmlFile = None,
) -> None:
    """Ask a model questions, plain and re-balanced, and report the difference.

    Finished items are on disk at once: the same command continues where it was stopped, and with a larger --limit it
    asks only what is new.
    """
    place: list[Path] = []
    with user_errors():
        from attnrb.evaluation.grid import evaluate as go
        from attnrb.evaluation.page import check_installed, page
        from attnrb.evaluation.plan import Plan, plan_names
        from attnrb.policies.parse import parse_policy
    with running.run_errors(place):
        plan = Plan(
            tasks=plan_names(tasks),
            data=data,
            include_path=include_path,
            configs=tuple(parse_policy(each) for each in config or ()) or (policy.policy(),),
            prompting=prompting,
            budgets=None if budgets is None else parse_budgets(budgets),
            min_computed=min_computed,
            max_computed=max_computed,
            limit=limit,
            shuffle=shuffle,
            seed=seed,
            shots=shots,
            generated=generated,
            chat=chat,
        )
        rows = running.batch_size(batch_size)
        running.check_engine(engine, generates=generated or prompting != "direct")
        files.check_outputs(run=run, json=json, csv=csv, html=html)
        if html is not None:
            check_installed()
        place.append(running.run_file(run, json, plan.run_file(running.model_name(loading.options.model))))
        lm, selected = running.start(plan, place[0], loading, rows, engine=engine)
        with running.progress() as progress:
            report = go(
                lm,
                plan,
                place[0],
                model=running.model_name(loading.options.model),
                selected=selected,
                progress=progress,
            )
    if report is None:
        return
    document = report.to_dict()
    if files.is_standard_output(json):
        print_json(document)
    else:
        render(output(), document)
    running.write({json: report.to_json, csv: report.to_csv, html: lambda: page(document)})


def parse_budgets(text: str) -> tuple[int, ...]:
    """Numbers of computed tokens, of a list like ``0,64,128``. Raises ValueError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ValueError(f"budgets: expected numbers like 0,64,128, got {text!r}")
    return tuple(int(part) for part in parts)


def render(console: Console, report: Mapping[str, Any]) -> None:
    """Print a report: what was found in a sentence, then the figures."""
    from attnrb.evaluation.page import letter_notes
    from attnrb.evaluation.report import headline

    console.print(Text(printable(headline(report["differences"])), style="bold"), soft_wrap=True)
    console.print(_accuracies(report))
    if any(pair["groups"] for pair in report["differences"]):
        console.print(_differences(report["differences"]))
    for name, about in report["tasks"].items():
        if about.get("note"):
            console.print(Text(printable(f"{name}: {about['note']}"), style="dim"), soft_wrap=True)
    for note in letter_notes(report):
        console.print(Text(printable(note), style="yellow"), soft_wrap=True)
    if any(result["truncated"] for result in report["results"]):
        console.print(Text("Some prompts exceeded the model's context and lost their beginning.", style="dim"))
    memory = ", ".join(f"{size / 2**30:.1f} GiB {kind}" for kind, size in report["peak_memory"].items())
    errors().print(
        Text(
            f"{report['answers']:,} answers in {report['run']}; {duration(report['seconds'])} this time, "
            f"peak memory {memory}"
        ),
        soft_wrap=True,
    )


def _accuracies(report: Mapping[str, Any]) -> Table:
    from attnrb.evaluation.page import percent

    table = _table("questions", "right", "95 % interval", "no answer", "tokens, mean")
    names = list(dict.fromkeys(name for result in report["results"] for name in result["groups"]))
    for name in names:
        for result in report["results"]:
            if name in result["groups"]:
                each, tokens = result["groups"][name], result["computed_tokens"]["mean"]
                low, high = each["wilson"]
                table.add_row(
                    *_words(name, result["arm"], result["label"]),
                    f"{each['items']:,}",
                    percent(each["accuracy"]),
                    f"{100 * low:.1f}–{100 * high:.1f}",
                    f"{each['no_answer']:,}",
                    "" if tokens is None else f"{tokens:.0f}",
                )
    return table


def _differences(pairs: Sequence[Mapping[str, Any]]) -> Table:
    from attnrb.evaluation.page import points

    needed = any(each["needed_items"] for pair in pairs for each in pair["groups"].values())
    table = _table("points", "95 % interval", "p (Holm)", *(["questions needed"] if needed else []))
    table.add_column("found")
    for pair in pairs:
        for name, each in pair["groups"].items():
            low, high = each["bootstrap"]
            figures = [points(each["difference"]), f"{points(low)} to {points(high)}", f"{each['holm']:.2g}"]
            if needed:
                figures.append("" if each["needed_items"] is None else f"{each['needed_items']:,}")
            table.add_row(*_words(name, pair["arm"], pair["label"]), *figures, each["verdict"])
    return table


def _table(*figures: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("tasks", "model", "prompt"):
        table.add_column(heading, overflow="fold", min_width=6)
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _words(*cells: str) -> list[Text]:
    return [Text(printable(each)) for each in cells]


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness' own command, with its own arguments; it knows the model `attnrb`.

    attnrb lm-eval --model attnrb --model_args pretrained=FOLDER,alpha=0.2 --tasks hellaswag
    """
    with user_errors():
        from lm_eval.__main__ import cli_evaluate

        from attnrb.hosts.lm_eval import model  # noqa: F401 (registers the model)

        _check_model_args(context.args)
        sys.argv = ["lm-eval", *context.args]
        cli_evaluate()


def _check_model_args(args: Sequence[str]) -> None:
    """Refuse values that the harness would read as numbers and that are none, as ``1_0`` in ``--model_args``."""
    waiting = False
    for each in args:
        option, equals, value = each.partition("=")
        if each.startswith("-"):
            waiting = option in ("--model_args", "-a")
            each = value if equals and waiting else ""
        for part in each.split(",") if waiting else ():
            name, _, text = part.partition("=")
            if reads_as_number(text) and not is_number(text.strip()):
                raise ValueError(f"{name}: expected a number, or a name in quotes, got {text!r}")
