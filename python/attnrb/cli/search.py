"""``attnrb search``: the re-balancing that suits a model, chosen on some items and reported on others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from attnrb.cli import options, running
from attnrb.cli.console import errors, output, print_json, steps, user_errors
from attnrb.cli.eval import render
from attnrb.printable import printable

_SEARCH = "Search"


def search(
    tasks: running.Tasks,
    data: running.Data = None,
    evaluations: Annotated[
        int, typer.Option("--evaluations", "-n", min=1, help="Settings to try.", rich_help_panel=_SEARCH)
    ] = 20,
    development: Annotated[
        int, typer.Option(min=1, help="Items of each task to choose by.", rich_help_panel=_SEARCH)
    ] = 20,
    held_out: Annotated[
        int | None,
        typer.Option(
            min=1, help="Items of each task to report on.", show_default="all others", rich_help_panel=_SEARCH
        ),
    ] = None,
    alpha: Annotated[str, typer.Option(help="Bounds of the strength.", rich_help_panel=_SEARCH)] = "0,1",
    threshold: Annotated[str, typer.Option(help="Bounds of the threshold.", rich_help_panel=_SEARCH)] = "0.002,0.1",
    most_source_layer: Annotated[
        int | None,
        typer.Option(
            min=0, help="Highest source layer.", show_default="a quarter of the layers", rich_help_panel=_SEARCH
        ),
    ] = None,
    shots: running.Shots = 0,
    chat: running.Chat = False,
    model: options.Model = None,
    dtype: options.DType = "float32",
    threads: options.Threads = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the splits, the sampler and the bootstrap.", rich_help_panel="Model and run")
    ] = 0,
    batch_size: running.BatchSize = "auto",
    run: running.RunOption = None,
    json: running.JsonFile = None,
    html: running.HtmlFile = None,
) -> None:
    """Search alpha, threshold, source layer and layer range on a development split; report on held-out items."""
    place: list[Path] = []
    with user_errors():
        from attnrb.evaluation.grid import plan_names
        from attnrb.evaluation.search import SearchPlan
    with running.run_errors(lambda: place[0] if place else None):
        plan = SearchPlan(
            tasks=plan_names(tasks),
            data=data,
            evaluations=evaluations,
            development=development,
            held_out=held_out,
            alpha=_bounds("alpha", alpha),
            threshold=_bounds("threshold", threshold),
            most_source_layer=most_source_layer,
            seed=seed,
            shots=shots,
            chat=chat,
        )
        rows = running.batch_size(batch_size)
        running.check_outputs(json, html=html)
        file = (
            json.with_name(f"{json.stem}.items.jsonl") if run is None and json is not None and str(json) != "-" else run
        )
        place.append(file or Path(f"attnrb-search-{seed}.jsonl"))
        result = _search(plan, model, dtype, threads, rows, place[0])
    if result is None:
        return
    document = result.to_dict()
    if json is not None and str(json) == "-":
        print_json(document)
    else:
        label = document["held_out"]["results"][-1]["arm"]
        output().print(Text(printable(f"Chosen: {label}. On held-out items:")), soft_wrap=True)
        render(output(), document["held_out"])
    from attnrb.evaluation.search_page import search_page

    running.write_outputs({json: result.to_json, html: lambda: search_page(document)})


def _search(plan: Any, model: str | None, dtype: str, threads: int | None, rows: int | str, file: Path) -> Any:
    from attnrb.evaluation.search import search as go
    from attnrb.evaluation.selection import select
    from attnrb.models import DEFAULT_MODEL_NAME

    first = running.is_first_process()
    with steps() as step:
        step("Reading the items")
        select(plan.tasks, plan.data, shots=plan.shots)
        lm = running.load_plain(model, dtype, threads, rows, step)

    def tell(line: str) -> None:
        if first:
            console = errors()
            dots = "..." if console.options.ascii_only else "…"
            console.print(Text(f"{printable(line)} {dots}"), soft_wrap=True)

    with running.progress(shown=first) as progress:
        return go(lm, plan, file, model=model or DEFAULT_MODEL_NAME, progress=progress, step=tell)


def _bounds(name: str, text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name}: expected two numbers like 0,1, got {text!r}") from None
    return low, high
