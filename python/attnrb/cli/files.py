"""Files that commands write: the options that name them, refused early where they cannot be, written whole."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from attnrb.cli.console import as_json, errors, fail, print_json
from attnrb.reports.files import write_whole
from attnrb.reports.printable import printable
from attnrb.text.reading import BYTE_ORDER_MARK

PANEL = "Files to write"

JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        help="Write everything as JSON; - (or no name) prints it in place of the text.",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
HtmlFile = Annotated[
    Path | None,
    typer.Option("--html", help="One self-contained page with plots.", show_default=False, rich_help_panel=PANEL),
]


def standard_input() -> str:
    """All of standard input, without a byte-order mark.

    Raises:
        ValueError: it is closed, or not UTF-8 text.
    """
    if sys.stdin is None:
        raise ValueError("standard input is closed, so nothing can be read from it")
    if isinstance(sys.stdin, io.TextIOWrapper) and codecs.lookup(sys.stdin.encoding).name == "ascii":
        # A locale that knows nothing else, as in many containers, where each byte would come as half of a pair.
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        return sys.stdin.read().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not {error.encoding} text: byte {error.start} cannot be read") from error


def is_file(name: str) -> bool:
    """Whether there is a file of this name."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # a text longer than a name may be, or with a NUL in it
        return False


def is_standard_output(path: Path | None) -> bool:
    """Whether an option says ``-``."""
    return path is not None and str(path) == "-"


def check_outputs(**paths: Path | None) -> None:
    """Raise ValueError for a file that cannot be written, before the work rather than after it.

    Args:
        paths: what options name, by the option's name.
    """
    for name, path in paths.items():
        if path is None or is_standard_output(path):
            continue
        if name == "json" and path.suffix.lower() != ".json" and not path.exists():
            # A prompt behind a bare --json would become a file.
            raise ValueError(f"json: expected - or the name of a .json file, got {str(path)!r}")
        folder = path.absolute().parent
        if not folder.is_dir():
            raise ValueError(f"{name}: {str(path)!r} cannot be written: there is no folder {str(path.parent)!r}")
        if path.is_dir():
            raise ValueError(f"{name}: {str(path)!r} cannot be written: it is a folder")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise ValueError(f"{name}: {str(path)!r} cannot be written: permission is denied")


def print_or_write_json(path: Path | None, document: Callable[[], object], show: Callable[[], None]) -> None:
    """Hand over a result: on the terminal as `show` has it, and as JSON where ``--json`` asks for it.

    Args:
        path: of ``--json``.
        document: makes what is written; it may raise ValueError for what JSON has not.
        show: prints the result for a person.
    """
    if is_standard_output(path):
        print_json(document())
        return
    show()
    if path is not None:
        content = as_json(document(), wide=True)
        written = write_outputs({path: lambda place: write_whole(place, content + "\n")})
        errors().print(Text(f"Wrote {', '.join(written)}"), soft_wrap=True)


def write_outputs(files: Mapping[Path | None, Callable[[Path], object]], *, kept: str = "") -> list[str]:
    """Write each file that is asked for, or end with one sentence that says which could not be.

    Args:
        files: what writes each; it raises OSError where it cannot.
        kept: what the sentence adds, of what is not lost.

    Returns:
        The names of what was written.
    """
    written = []
    for path, write in files.items():
        if path is None or is_standard_output(path):
            continue
        try:
            write(path)
        except OSError as error:
            fail(f"{str(path)!r} could not be written: {error.strerror or error}{kept}")
        written.append(printable(str(path)))
    return written
