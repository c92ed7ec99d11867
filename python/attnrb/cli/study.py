"""``attnrb study``: what pointing at part of a prompt, or re-balancing, does to a model, on items made here."""

from __future__ import annotations

import json as json_format
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from attnrb.studies.plan import StudyPlan

app = typer.Typer(no_args_is_help=True, help="Measure what an edit of attention does to a model, on items made here.")

_WHAT = "What is asked"
Quick = Annotated[
    bool, typer.Option("--quick", help="About 100 items a task, in minutes rather than hours.", rich_help_panel=_WHAT)
]
Items = Annotated[
    int | None,
    typer.Option(
        "--items",
        min=2,
        help="Held-out items of each task.",
        show_default="500; gains, selection: 200; quick: 100",
        rich_help_panel=_WHAT,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder of files, as `attnrb data` makes them: natural text is asked too.",
        show_default=False,
        rich_help_panel=_WHAT,
    ),
]
Keep = Annotated[int, typer.Option("--keep", min=1, help="Heads of a profile.")]
Seed = Annotated[int, typer.Option("--seed", help="Of items, random heads and the bootstrap.")]
Estimate = Annotated[bool, typer.Option("--estimate", help="Say how much it is and about how long it takes, and stop.")]

_FULL_STRENGTHS, _QUICK_STRENGTHS = (4.0, 8.0, 16.0, 64.0), (8.0, 16.0)
_FULL_ITEMS, _QUICK_ITEMS, _GAINS_ITEMS = 500, 100, 200
_FULL_DEVELOPMENT, _QUICK_DEVELOPMENT = 32, 16
_SELECTION_DEVELOPMENT = 72
_CONTEXT = 8192  # of a model that does not say
_NEEDLES, _WRITTEN, _BUDGETS = "2048,4096,8000", 300, "0,64,128"  # 8,192 with question and answer


@dataclass(frozen=True)
class _Run:
    """Where a study goes, and whether it runs at all."""

    estimate: bool
    run: Path | None
    json: Path | None
    html: Path | None
    engine: str = "transformers"


@takes_model
def emphasis(
    *,
    quick: Quick = False,
    items: Items = None,
    data: Data = None,
    needles: Annotated[
        str | None,
        typer.Option(
            help="Tokens of prompts that hold a needle, like 2048,4096; none: no such task.",
            show_default=f"{_NEEDLES}; quick: none",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    written: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Items whose answer is written, and checked by a program.",
            show_default=f"{_WRITTEN}; quick: 0",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a written answer at most.", rich_help_panel=_WHAT)] = 64,
    keep: Keep = 32,
    seed: Seed = 0,
    estimate: Estimate = False,
    loading: Loading,
    engine: running.Engine = "transformers",
    run: running.RunOption = None,
    json: files.JsonFile = None,
    html: files.HtmlFile = None,
) -> None:
    """Does emphasis make a model go by what is marked? Every arm against the plain model, with controls and prices.

    Heads and strength come from development items alone. The same command continues where it was stopped.
    """
    with user_errors():
        chosen = {
            "study": "emphasis",
            "keep": keep,
            "strengths": _QUICK_STRENGTHS if quick else _FULL_STRENGTHS,
            "needles": _numbers("needles", needles, () if quick else _NEEDLES),
            "written": (0 if quick else _WRITTEN) if written is None else written,
            "tokens": tokens,
            **_items(quick, items, data, seed),
        }
    _study(chosen, loading, _Run(estimate, run, json, html, engine))


@takes_model
def rebalancing(
    *,
    quick: Quick = False,
    items: Items = None,
    data: Data = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Computed tokens of a chain of thought, like 0,64; none: no such task. Needs --data.",
            show_default=f"{_BUDGETS}; quick: none",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    seed: Seed = 0,
    estimate: Estimate = False,
    loading: Loading,
    run: running.RunOption = None,
    json: files.JsonFile = None,
    html: files.HtmlFile = None,
) -> None:
    """Does re-balancing change how many items a model gets right? Strengths from 0.2 to 16, source layers, controls."""
    with user_errors():
        held = {"budgets": _numbers("budgets", budgets, () if quick or data is None else _BUDGETS)}
        if budgets is not None and held["budgets"] and data is None:
            raise ValueError("budgets: expected together with --data, which has the questions")
    _study(
        {"study": "rebalancing", **held, **_items(quick, items, data, seed)}, loading, _Run(estimate, run, json, html)
    )


@takes_model
def gains(
    *,
    quick: Quick = False,
    items: Items = None,
    data: Data = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, show_default="60; quick: 12", rich_help_panel=_WHAT)
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", min=1, help="Runs of each kind.", show_default="3; quick: 1", rich_help_panel=_WHAT),
    ] = None,
    seed: Seed = 0,
    estimate: Estimate = False,
    loading: Loading,
    run: running.RunOption = None,
    json: files.JsonFile = None,
    html: files.HtmlFile = None,
) -> None:
    """Do learnt gains help? On outliers, the first key and spans, against controls of equal size and LoRA of rank 1."""
    chosen = {"study": "gains", "steps": steps or (12 if quick else 60), "seeds": seeds or (1 if quick else 3)}
    items = items or (_QUICK_ITEMS if quick else _GAINS_ITEMS)
    _study({**chosen, **_items(quick, items, data, seed)}, loading, _Run(estimate, run, json, html))


@takes_model
def selection(
    *,
    quick: Quick = False,
    items: Items = None,
    data: Data = None,
    development: Annotated[
        int | None,
        typer.Option(
            "--development",
            min=1,
            help="Items of each task that the last settings are compared on.",
            show_default="72; quick: 16",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    seed: Seed = 0,
    estimate: Estimate = False,
    loading: Loading,
    engine: running.Engine = "transformers",
    run: running.RunOption = None,
    json: files.JsonFile = None,
    html: files.HtmlFile = None,
) -> None:
    """Which heads and layers to emphasise in? Many settings by successive halving, the best one on held-out items."""
    chosen = {"study": "selection", "strengths": _QUICK_STRENGTHS if quick else _FULL_STRENGTHS}
    items = items or (_QUICK_ITEMS if quick else _GAINS_ITEMS)
    held = {"development": development or (_QUICK_DEVELOPMENT if quick else _SELECTION_DEVELOPMENT)}
    _study({**chosen, **_items(quick, items, data, seed), **held}, loading, _Run(estimate, run, json, html, engine))


def _numbers(name: str, text: str | None, default: str | tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of a list with commas; ``none`` is no number."""
    if text is None and not isinstance(default, str):
        return default
    text = str(default) if text is None else text
    if text == "none":
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ValueError(f"{name}: expected numbers with commas between, or none, got {text!r}")
    return tuple(int(part) for part in parts)


def _items(quick: bool, items: int | None, data: Path | None, seed: int) -> dict[str, Any]:
    return {
        "quick": quick,
        "items": items or (_QUICK_ITEMS if quick else _FULL_ITEMS),
        "development": _QUICK_DEVELOPMENT if quick else _FULL_DEVELOPMENT,
        "data": data,
        "seed": seed,
    }


def _study(chosen: dict[str, Any], loading: Loading, how: _Run) -> None:
    place: list[Path] = []
    with user_errors():
        from attnrb.hosts.processes import Processes
        from attnrb.studies.study_page import check_installed, study_page
        from attnrb.studies.study_run import StudyPlan, check_run, default_run_file, study_report
    with running.run_errors(place):
        plan = StudyPlan(**chosen)
        running.check_engine(how.engine, generates=False)
        if how.engine == "vllm":
            from attnrb.hosts.vllm.offline import check_installed as check_vllm

            check_vllm()
        plan.sources()  # what is wrong with a file is known before a model is loaded
        files.check_outputs(run=how.run, json=how.json, html=how.html)
        if how.html is not None:
            check_installed()
        name = running.model_name(loading.options.model)
        place.append(running.run_file(how.run, how.json, default_run_file(plan, name)))
        processes = Processes.found()
        if not (how.estimate or processes.rank):  # the first process alone locks the file
            check_run(place[0], plan)
        with steps() as step:
            loaded, tokenizer = load_model(loading.on(processes.device), step)
            if how.estimate:
                step("Counting and timing")
                if not processes.rank:
                    print_estimate(plan, loaded)
                return
            engine = _vllm(loaded, tokenizer, step) if how.engine == "vllm" else None
        with running.progress() as progress:
            report = study_report(
                loaded,
                tokenizer,
                plan,
                place[0],
                model_name=name,
                progress=progress,
                processes=processes,
                engine=engine,
            )
    if report is None:
        return
    if files.is_standard_output(how.json):
        print_json(report)
    else:
        render(output(), report)
    running.write({how.json: lambda: study_json(report), how.html: lambda: study_page(report)})


def _vllm(model: Any, tokenizer: Any, step: Callable[[str], None]) -> Any:
    """An engine of vLLM with the weights of a model."""
    step("Starting vLLM")
    from attnrb.hosts.vllm.offline import offline_engine
    from attnrb.studies.engines import VllmEngine
    from attnrb.studies.study import context_of

    llm = offline_engine(model, tokenizer, context_of(model) or _CONTEXT)
    return VllmEngine(llm, model, tokenizer)


def print_estimate(plan: StudyPlan, model: Any) -> None:
    """Print how much a study is, and about how long it takes."""
    from attnrb.studies.work import seconds_of, study_work

    work = study_work(plan, model)
    took = duration(seconds_of(work, model))
    output().print(
        Text(
            f"{work.answers:,} answers: about {work.read:,} tokens to read and at most {work.written:,} to write. "
            f"At the speed of some timed forwards that is about {took} in one process; batches of unlike lengths and "
            "edits of attention take more."
        ),
        soft_wrap=True,
    )


def study_json(report: Mapping[str, Any]) -> str:
    """A report as the text of a file."""
    return json_format.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def render(console: Console, report: Mapping[str, Any]) -> None:
    """Print a report."""
    from attnrb.studies.study_report import profile_table

    head, rows = profile_table(report)
    console.print(Text("Right answers, in percent"))
    for tasks in _columns(len(head) - 1, console.width):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(head[0], overflow="fold")
        for task in tasks:
            table.add_column(head[task], justify="right")
        for row in rows:
            if any(row[task] for task in tasks):
                table.add_row(*(Text(printable(row[column])) for column in (0, *tasks)))
        console.print(table)
    for each in report["requirements"]:
        holds = "yes" if each["holds"] else "NO"
        console.print(Text(f"{each['task']}: {each['what']}: {holds}"), soft_wrap=True)
    for task, why in report["left_out"].items():
        console.print(Text(printable(f"{task}: not asked: {why}"), style="dim"), soft_wrap=True)
    seconds = sum(report["cpu_seconds"].values())
    line = f"{report['answers']:,} answers in {report['run']}; {duration(seconds)} of processor time for all"
    errors().print(Text(printable(line)), soft_wrap=True)


_ARM_WIDTH, _TASK_WIDTH = 30, 13  # of columns, in characters: enough to read names in


def _columns(count: int, width: int) -> list[range]:
    """The columns 1 to ``count`` of a table in parts that a console of this width has room for."""
    fit = max(1, (width - _ARM_WIDTH) // _TASK_WIDTH)
    return [range(first, min(first + fit, count + 1)) for first in range(1, count + 1, fit)]


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
add(app, selection, examples=("attnrb study selection --quick --estimate",))
