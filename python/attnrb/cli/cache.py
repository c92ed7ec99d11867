"""``attnrb cache``: the converted copies of GGUF files, listed and cleared."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from attnrb.cli import files
from attnrb.cli.command import add
from attnrb.cli.console import output, user_errors
from attnrb.reports.printable import printable

cache = typer.Typer(
    help="Show or clear the converted copies of GGUF files that later starts read.", no_args_is_help=True
)


def list_(*, json: files.JsonFile = None) -> None:
    """List what the cache holds, and which transformers reads it."""
    with user_errors():
        from attnrb.models.cache import copies
        from attnrb.models.gguf import cache_folder

        files.check_outputs(json=json)
        folder, found = cache_folder(), copies()

    def show() -> None:
        console = output()
        if folder is None:
            console.print("The cache is turned off: ATTNRB_CACHE is empty, or there is no home folder.")
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("copy", overflow="fold")
        table.add_column("size", justify="right", no_wrap=True)
        table.add_column("made by transformers")
        for each in found:
            made_by = "unknown" if each.transformers is None else each.transformers
            table.add_row(
                Text(printable(each.name)), _size(each.bytes), Text(made_by + ("" if each.in_use else ", not used now"))
            )
        if found:
            console.print(table)
        console.print(Text(f"{_size(sum(each.bytes for each in found))} in {printable(str(folder))}"), soft_wrap=True)

    facts = {"folder": None if folder is None else str(folder), "copies": [each.to_dict() for each in found]}
    files.print_or_write_json(json, lambda: facts, show)


def clear(
    name: Annotated[str | None, typer.Argument(help="Copies whose names begin so.", show_default="all")] = None,
    *,
    unused: Annotated[
        bool, typer.Option("--unused", help="Only copies that the installed transformers does not read.")
    ] = False,
) -> None:
    """Remove copies. The next start with such a model converts it again, which takes seconds."""
    with user_errors():
        from attnrb.models.cache import clear as go

        gone = go(name, unused=unused)
    freed = _size(sum(each.bytes for each in gone))
    count = len(gone)
    output().print(Text(f"Removed {count} cop{'y' if count == 1 else 'ies'}, {freed}"))


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


add(cache, list_, "list", examples=("attnrb cache list", "attnrb cache list --json"))
add(cache, clear, examples=("attnrb cache clear --unused", "attnrb cache clear SmolLM2"))
