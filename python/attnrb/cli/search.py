"""``attnrb search``: the re-balancing that suits a model, chosen on some items and reported on others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from attnrb.cli import files, options, running
from attnrb.cli.console import output, print_json, user_errors
from attnrb.cli.eval import render
from attnrb.cli.loading import Loading, takes_model
from attnrb.policies.parse import parse_policy
from attnrb.reports.printable import printable
from attnrb.text.reading import is_number, is_whole_number

_SEARCH = "Search"


@takes_model
@options.takes_any_policy
def search(
    *,
    tasks: running.Tasks,
    data: running.Data = None,
    include_path: running.IncludePath = None,
    evaluations: Annotated[
        int, typer.Option("--evaluations", "-n", min=1, help="How many settings to try.", rich_help_panel=_SEARCH)
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
    policy: options.PolicyChoice,
    range_: Annotated[
        list[str] | None,
        typer.Option(
            "--range",
            help="Bounds of an option of --policy, as name=low,high, in place of those above. May be given again.",
            show_default=False,
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            "-c",
            help="A policy in one word, or learnt gains, to try before the others; or a .yaml file of this command's "
            "options. May be given again.",
            show_default=False,
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    halving: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Try all settings on few items, and the best of each so many on so many times as many.",
            show_default="every setting on all items",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    generated: running.Generated = False,
    shots: running.Shots = 0,
    chat: running.Chat = False,
    loading: Loading,
    seed: running.Seed = 0,
    batch_size: running.BatchSize = "auto",
    run: running.RunOption = None,
    json: files.JsonFile = None,
    html: files.HtmlFile = None,
) -> None:
    """Search for the settings of a policy on a development split; report on held-out items."""
    place: list[Path] = []
    with user_errors():
        from attnrb.evaluation.page import check_installed
        from attnrb.evaluation.plan import plan_names
        from attnrb.evaluation.search_page import search_page
        from attnrb.evaluation.trials import SearchPlan
        from attnrb.evaluation.trials import search as go
    with running.run_errors(place):
        plan = SearchPlan(
            tasks=plan_names(tasks),
            data=data,
            include_path=include_path,
            evaluations=evaluations,
            development=development,
            held_out=held_out,
            alpha=_bounds("alpha", alpha),
            threshold=_bounds("threshold", threshold),
            most_source_layer=most_source_layer,
            policy=policy.policy() if policy.given else None,
            ranges=tuple(_range(each) for each in range_ or ()),
            candidates=tuple(parse_policy(each) for each in config or ()),
            halving=halving,
            seed=seed,
            shots=shots,
            generated=generated,
            chat=chat,
        )
        rows = running.batch_size(batch_size)
        files.check_outputs(run=run, json=json, html=html)
        if html is not None:
            check_installed()
        place.append(running.run_file(run, json, plan.run_file(running.model_name(loading.options.model))))
        lm, selected = running.start(plan, place[0], loading, rows)
        with running.progress() as progress:
            result = go(
                lm,
                plan,
                place[0],
                model=running.model_name(loading.options.model),
                selected=selected,
                progress=progress,
                step=running.tell_step,
            )
    if result is None:
        return
    document = result.to_dict()
    if files.is_standard_output(json):
        print_json(document)
    else:
        label = document["held_out"]["results"][-1]["arm"]
        output().print(Text(printable(f"Chosen: {label}. On held-out items:")), soft_wrap=True)
        render(output(), document["held_out"])
    running.write({json: result.to_json, html: lambda: search_page(document)})


def _range(text: str) -> tuple[str, float, float]:
    name, equals, bounds = text.partition("=")
    if not equals or len(found := _numbers(bounds)) != 2:
        raise ValueError(f"range: expected name=low,high, got {text!r}")
    return name.strip(), found[0], found[1]


def _bounds(name: str, text: str) -> tuple[float, float]:
    if len(found := _numbers(text)) != 2:
        raise ValueError(f"{name}: expected two numbers like 0,1, got {text!r}")
    return found[0], found[1]


def _numbers(text: str) -> list[float]:
    """Finite numbers with commas between; none where one of them is no number."""
    parts = [part.strip() for part in text.split(",")]
    if not all(is_number(part) and math.isfinite(float(part)) for part in parts):
        return []
    return [int(part) if is_whole_number(part) else float(part) for part in parts]
