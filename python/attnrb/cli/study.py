"""``attnrb study``: what pointing at part of a prompt, or re-balancing, does to a model, on items made here."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from attnrb.cli import files, running
from attnrb.cli.command import add
from attnrb.cli.console import duration, errors, output, print_json, steps, user_errors
from attnrb.cli.loading import Loading, load_model, takes_model
from attnrb.reports.printable import printable

app = typer.Typer(no_args_is_help=True, help="Measure what an edit of attention does to a model, on items made here.")

Quick = Annotated[bool, typer.Option("--quick", help="About 100 items a task, in minutes rather than hours.")]
Items = Annotated[
    int | None, typer.Option("--items", min=2, help="Held-out items of each task.", show_default="500; quick: 100")
]
Keep = Annotated[int, typer.Option("--keep", min=1, help="Heads of a profile.")]
Seed = Annotated[int, typer.Option("--seed", help="Of items, random heads and the bootstrap.")]

_FULL_STRENGTHS, _QUICK_STRENGTHS = (4.0, 8.0, 16.0, 64.0), (8.0, 16.0)
_FULL_ITEMS, _QUICK_ITEMS = 500, 100


@takes_model
def emphasis(
    *,
    quick: Quick = False,
    items: Items = None,
    keep: Keep = 32,
    seed: Seed = 0,
    loading: Loading,
    run: running.RunOption = None,
    json: files.JsonFile = None,
    html: files.HtmlFile = None,
) -> None:
    """Does emphasis make a model go by what is marked? Every arm against the plain model, with controls and prices.

    Heads and strength come from development items alone. The same command continues where it was stopped.
    """
    strengths = _QUICK_STRENGTHS if quick else _FULL_STRENGTHS
    chosen = {"study": "emphasis", "quick": quick, "keep": keep, "strengths": strengths}
    _study({**chosen, **_items(quick, items, seed)}, loading, run, json, html)


@takes_model
def rebalancing(
    *,
    quick: Quick = False,
    items: Items = None,
    seed: Seed = 0,
    loading: Loading,
    run: running.RunOption = None,
    json: files.JsonFile = None,
    html: files.HtmlFile = None,
) -> None:
    """Does re-balancing change how many of these items a model gets right? Strengths from 0.2 to 16, and a control."""
    _study({"study": "rebalancing", "quick": quick, **_items(quick, items, seed)}, loading, run, json, html)


@takes_model
def gains(
    *,
    quick: Quick = False,
    items: Items = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, show_default="60; quick: 12")] = None,
    seed: Seed = 0,
    loading: Loading,
    run: running.RunOption = None,
    json: files.JsonFile = None,
    html: files.HtmlFile = None,
) -> None:
    """Do learnt gains help? On outliers and on spans, against a control of equal size, learnt on development items."""
    chosen = {"study": "gains", "quick": quick, "steps": steps or (12 if quick else 60), "seeds": 1 if quick else 3}
    _study({**chosen, **_items(quick, items, seed)}, loading, run, json, html)


def _items(quick: bool, items: int | None, seed: int) -> dict[str, int]:
    return {"items": items or (_QUICK_ITEMS if quick else _FULL_ITEMS), "seed": seed}


def _study(chosen: dict[str, Any], loading: Loading, run: Path | None, json: Path | None, html: Path | None) -> None:
    place: list[Path] = []
    with user_errors():
        from attnrb.studies.study_page import check_installed, study_page
        from attnrb.studies.study_run import StudyPlan, check_run, default_run_file, study_report
    with running.run_errors(place):
        plan = StudyPlan(**chosen)
        files.check_outputs(run=run, json=json, html=html)
        if html is not None:
            check_installed()
        name = running.model_name(loading.options.model)
        place.append(running.run_file(run, json, default_run_file(plan, name)))
        check_run(place[0], plan)
        with steps() as step:
            loaded, tokenizer = load_model(loading, step)
        with running.progress() as progress:
            report = study_report(loaded, tokenizer, plan, place[0], model_name=name, progress=progress)
    if files.is_standard_output(json):
        print_json(report)
    else:
        render(output(), report)
    running.write({json: lambda: study_json(report), html: lambda: study_page(report)})


def study_json(report: Mapping[str, Any]) -> str:
    """A report as the text of a file."""
    return json_format.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def render(console: Console, report: Mapping[str, Any]) -> None:
    """Print a report."""
    from attnrb.studies.study_report import profile_table

    head, rows = profile_table(report)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Right answers, in percent", title_justify="left")
    table.add_column(head[0], overflow="fold")
    for each in head[1:]:
        table.add_column(each, justify="right")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)
    for each in report["requirements"]:
        holds = "yes" if each["holds"] else "NO"
        console.print(Text(f"{each['task']}: {each['what']}: {holds}"), soft_wrap=True)
    seconds = sum(report["cpu_seconds"].values())
    line = f"{report['answers']:,} answers in {report['run']}; {duration(seconds)} of processor time for all"
    errors().print(Text(printable(line)), soft_wrap=True)


add(
    app,
    emphasis,
    examples=(
        "attnrb study emphasis --quick",
        "attnrb study emphasis -m Qwen/Qwen3-0.6B --dtype bf16 --json e.json --html e.html",
    ),
)
add(app, rebalancing, examples=("attnrb study rebalancing --quick --json r.json",))
add(app, gains, examples=("attnrb study gains --quick --steps 20",))
