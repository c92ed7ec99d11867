"""How the command line speaks: results on stdout, progress and errors on stderr, text from tokens made harmless."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from attnrb.reports.printable import printable

DEBUG_VARIABLE = "ATTNRB_DEBUG"


def output() -> Console:
    """The console of results. Characters that the stream cannot encode are replaced rather than raised on."""
    _tolerate(sys.stdout)
    return Console(highlight=False)


def errors() -> Console:
    """The console of progress and errors."""
    _tolerate(sys.stderr)
    return Console(stderr=True, highlight=False)


def _tolerate(stream: Any) -> None:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def print_json(value: Any) -> None:
    """Print one JSON document on stdout, in plain ASCII where the stream has no wider encoding."""
    wide = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    typer.echo(json.dumps(value, indent=2, ensure_ascii=not wide, allow_nan=False))


def fail(message: str) -> NoReturn:
    """Print one sentence on stderr and end with exit code 1."""
    sentence = " ".join(printable(message).split()).rstrip(".")
    errors().print(Text(f"attnrb: {sentence}.", style="red"), soft_wrap=True)
    raise typer.Exit(1)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn what the library raises for bad input into one sentence. ``ATTNRB_DEBUG=1`` shows the traceback instead."""
    from attnrb.cli.selfbench import WrongResultError
    from attnrb.models import ModelError

    try:
        yield
    except (ModelError, WrongResultError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        fail(str(error) or type(error).__name__)


def is_first_process() -> bool:
    """Whether this process speaks for a run in several (``accelerate launch``); all may tell of their errors."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Show the step in progress and its time on a terminal, a line a step elsewhere. Yields what names a step."""
    console = errors()
    if not is_first_process():
        yield lambda _: None
        return
    if not console.is_terminal:
        dots = "..." if console.options.ascii_only else "…"
        yield lambda step: console.print(Text(f"{step} {dots}"), soft_wrap=True)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda step: progress.reset(task, description=step)


def quiet_transformers() -> None:
    """Silence the bars and warnings of transformers, which would break the layout; downloads keep theirs."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    enable_progress_bars()
