"""What ``attnrb eval`` and ``attnrb search`` share: options, progress with the time left, files of results, errors."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from attnrb.cli.console import errors, fail, user_errors
from attnrb.cli.loading import set_threads

if TYPE_CHECKING:
    from attnrb.evaluation.runner import Progress

ITEMS = "Items"
ASKING = "How they are asked"
FILES = "Files"
_INTERRUPTED = 130  # as a shell has it for a program that an interrupt ended
_LINE_SECONDS = 30.0  # between lines of progress where there is no terminal

Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        "-t",
        help="Tasks with commas between: mmlu, mmlu_stem, mmlu_anatomy, piqa, siqa, gsm8k, any .jsonl file of --data, "
        "any task of lm-evaluation-harness.",
        show_default=False,
        rich_help_panel=ITEMS,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the items' files. Without one, the harness downloads them.",
        show_default=False,
        rich_help_panel=ITEMS,
    ),
]
Shots = Annotated[
    int, typer.Option(min=0, help="Examples before each question, for direct prompting.", rich_help_panel=ASKING)
]
Chat = Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat template.", rich_help_panel=ASKING)]
BatchSize = Annotated[str, typer.Option(help="Questions at a time, or auto.", rich_help_panel="Model and run")]
RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="File of finished items. One that exists is gone on with.",
        show_default="beside --json, else named by the settings",
        rich_help_panel=FILES,
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Write the report as JSON; - prints it.", show_default=False, rich_help_panel=FILES),
]
HtmlFile = Annotated[
    Path | None,
    typer.Option("--html", help="Write it as one HTML page with plots.", show_default=False, rich_help_panel=FILES),
]


def batch_size(text: str) -> int | str:
    """Of the option ``--batch-size``. Raises ValueError for what is neither a number above 0 nor ``auto``."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"batch_size: expected a number of 1 or above or auto, got {text!r}")
    return int(text)


def check_outputs(*paths: Path | None, html: Path | None = None) -> None:
    """Raise ValueError for a file that cannot be written, before hours of work rather than after."""
    for path in (*paths, html):
        if path is None or str(path) == "-":
            continue
        folder = path.parent
        if not folder.is_dir():
            raise ValueError(f"{path}: there is no folder {str(folder)!r}")
        if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
            raise ValueError(f"{path}: no file can be written there")
    if html is not None:
        from attnrb.evaluation.page import check_installed

        check_installed()


def write_outputs(files: Mapping[Path | None, Callable[[], str]]) -> None:
    """Write each file whole, or say which could not be."""
    from attnrb.files import write_whole

    for path, content in files.items():
        if path is None or str(path) == "-":
            continue
        try:
            write_whole(path, content())
        except OSError as error:
            fail(
                f"{path}: could not be written: {error.strerror}; the finished items are kept, "
                "and the same command writes it from them"
            )


def load_plain(model: str | None, dtype: str, threads: int | None, rows: int | str, step: Callable[[str], None]) -> Any:
    """The harness' model, plain."""
    step("Starting")
    set_threads(threads)
    from attnrb.evaluation.grid import quiet
    from attnrb.evaluation.model import AttnrbLM

    quiet()
    quiet_libraries()
    step(f"Loading {model or 'the embedded model'}")
    return AttnrbLM(model, plain=True, dtype=dtype, batch_size=rows)


def quiet_libraries() -> None:
    """Silence what would break the layout."""
    from attnrb.cli.console import quiet_transformers

    quiet_transformers()


@contextlib.contextmanager
def run_errors(run: Callable[[], Path | None]) -> Iterator[None]:
    """`user_errors`, and a plain word for an interrupt and for a run's file that fails."""
    from attnrb.evaluation.runfile import RunFileError

    try:
        with user_errors():
            yield
    except RunFileError as error:
        fail(str(error))
    except KeyboardInterrupt:
        path = run()
        kept = (
            "" if path is None or not path.exists() else f": finished items are in {path}, and the same command goes on"
        )
        errors().print(Text(f"attnrb: stopped{kept}.", style="red"), soft_wrap=True)
        raise typer.Exit(_INTERRUPTED) from None


@contextlib.contextmanager
def progress(*, shown: bool = True) -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left on a terminal, a line now and then elsewhere."""
    console = errors()
    start = time.monotonic()
    first: list[int] = []

    def left(state: Progress) -> str:
        first[:] = first or [state.work_done]
        done, elapsed = state.work_done - first[0], time.monotonic() - start
        if state.done >= state.total:
            return "done"
        return f"{duration(elapsed * (state.work - state.work_done) / done)} left" if done > 0 else ""

    if not shown:
        yield lambda _: None
    elif console.is_terminal:
        columns = (
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
        )
        with Bar(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None, count="", left="")

            def show(state: Progress) -> None:
                bar.update(
                    task,
                    total=state.work,
                    completed=state.work_done,
                    description=state.doing,
                    count=f"{state.done:,} of {state.total:,} answers",
                    left=left(state),
                )

            yield show
    else:
        last = [-_LINE_SECONDS]

        def tell(state: Progress) -> None:
            now = time.monotonic()
            remaining = left(state)
            if now - last[0] >= _LINE_SECONDS or state.done >= state.total:
                last[0] = now
                line = f"{state.done:,} of {state.total:,} answers, {remaining or state.doing}"
                console.print(Text(line), soft_wrap=True)

        yield tell


def duration(seconds: float) -> str:
    """For a person."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def is_first_process() -> bool:
    """Whether this process speaks for a run in several."""
    return os.environ.get("RANK", "0") == "0"


def silence_other_processes() -> None:
    """Of a run in several processes, one alone speaks."""
    if not is_first_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as the process)
