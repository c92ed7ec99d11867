"""``attnrb data``: the files of questions that ``attnrb eval --data`` reads, made from data sets of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from attnrb.cli.console import output, steps, user_errors
from attnrb.reports.printable import printable


def data(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TASK]...", help="piqa, siqa, gsm8k, mmlu.", show_default="all four"),
    ] = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files.")] = Path("data"),
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="Another data set for a task, as NAME=PLACE: an id on the hub, or a folder. May be given again.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the data sets.", show_default="main")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Make nothing: compare the folder's files with its SHA256SUMS.")
    ] = False,
) -> None:
    """Write files of questions for --data of eval and search, and their SHA256SUMS.

    It reads the data sets that lm-evaluation-harness reads, through the package datasets.
    """
    with user_errors():
        from attnrb.evaluation.hub_data import SOURCES, SUMS_FILE, check_sums, make

        if check:
            if wrong := check_sums(out):
                raise ValueError(f"out: {len(wrong)} files are not as {SUMS_FILE} says: {', '.join(wrong[:6])}")
            output().print(Text(f"All files of {printable(str(out))} are as {SUMS_FILE} says"), soft_wrap=True)
            return
        named = dict(_pair(each) for each in source or ())
        with steps() as step:
            made = make(tasks or list(SOURCES), out, sources=named, revision=revision, progress=step)
    said = {True: ", those of docs/results.md", False: ", other ones than those of docs/results.md", None: ""}
    for each in made:
        line = f"{each.task}: {each.items:,} questions of {each.dataset}{said[each.same]}"
        output().print(Text(printable(line)), soft_wrap=True)
    output().print(Text(f"Written to {printable(str(out))}, with {SUMS_FILE}"), soft_wrap=True)


def _pair(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not equals or not place:
        raise ValueError(f"source: expected NAME=PLACE, such as piqa=./my-copy, got {text!r}")
    return name.strip(), place.strip()
