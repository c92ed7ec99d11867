"""How the command line speaks: results on stdout, progress and errors on stderr, text from tokens made harmless."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text
from typer.core import TyperGroup

from attnrb.reports.printable import printable

DEBUG_VARIABLE = "ATTNRB_DEBUG"
INTERRUPTED = 130  # as a shell has it for a program that an interrupt ended

LINE_SECONDS = 30.0
"""Between lines of progress where there is no terminal."""

_EXTRAS = {
    **dict.fromkeys(("lm_eval", "datasets", "optuna", "scipy", "statsmodels"), "eval"),
    **dict.fromkeys(("matplotlib", "plotly"), "analysis"),
    **dict.fromkeys(("transformers", "gguf", "safetensors", "accelerate", "huggingface_hub"), "hf"),
    **dict.fromkeys(("peft", "trl"), "train"),
    "yaml": "cli",
}
"""The extra that brings each package which a command may lack."""

_FOR_MORE = f"and {DEBUG_VARIABLE}=1 shows where it came from"
_FOR_UTF8 = "Python reads files as ASCII here: set PYTHONUTF8=1"
_PACKAGE = Path(__file__).parents[1]


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
    """Print one JSON document on stdout, in plain ASCII where the stream has no wider encoding.

    Raises:
        ValueError: it holds NaN or an infinity, which JSON has not.
    """
    typer.echo(as_json(value, wide=_wide()))


def write_json(document: str) -> None:
    """Write a JSON document on stdout, in plain ASCII where the stream has no wider encoding."""
    # Beyond ASCII there is nothing but letters within texts.
    write(document if _wide() else re.sub(r"[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], document))


def _wide() -> bool:
    """Whether stdout takes any letter."""
    encoding = getattr(sys.stdout, "encoding", None) or ""  # of a closed stream there is none
    return encoding.lower().replace("-", "").startswith("utf")


def as_json(value: Any, *, wide: bool) -> str:
    """A JSON document; with ``wide``, letters beyond ASCII stand as they are. Raises ValueError as `print_json`."""
    try:
        document = json.dumps(value, indent=2, ensure_ascii=not wide, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            "the result holds numbers that are not finite, which JSON has not: activations of the model may exceed the "
            "range of its dtype; try --dtype float32"
        ) from error
    return document.encode("utf-8", "backslashreplace").decode()  # a lone surrogate becomes its escape in JSON


def write(text: str) -> None:
    """Write text on stdout as it is, at once. Nothing happens where stdout is closed."""
    if sys.stdout is not None:
        sys.stdout.write(text)
        sys.stdout.flush()


def warn(message: str) -> None:
    """Print one sentence on stderr and go on."""
    errors().print(Text(f"attnrb: {printable(message)}.", style="yellow"), soft_wrap=True)


def fail(message: str) -> NoReturn:
    """Print one sentence on stderr and end with exit code 1."""
    sentence = " ".join(printable(message).split()).rstrip(".")
    end = "" if sentence.endswith("?") else "."
    errors().print(Text(f"attnrb: {sentence}{end}", style="red"), soft_wrap=True)
    raise typer.Exit(1)


class OneSentence(TyperGroup):
    """The program, in which whatever a command raises, and wherever, ends as `user_errors` says."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Parse and run: help and the words of the packages that do the work may hold letters that no stream takes."""
        _tolerate(sys.stdout)
        _tolerate(sys.stderr)
        return super().main(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and write out what waits in stdout while an error can still be told."""
        try:
            with user_errors():
                found = super().invoke(ctx)
                write("")
                return found
        finally:
            _drop_what_cannot_be_written()


def _drop_what_cannot_be_written() -> None:
    """Where stdout takes no more, as on a full disk, keep Python from trying again, aloud, as it ends."""
    try:
        write("")
    except BrokenPipeError:
        pass  # whoever read has gone, which the parser knows
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn any error into one sentence and exit code 1, an interrupt into a word and exit code 130.

    ``ATTNRB_DEBUG=1`` shows the traceback instead.
    """
    try:
        with _plain_warnings():
            yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        if _debugging():
            raise
        stop()
    except Exception as error:
        # Bad usage is the parser's own to tell.
        if hasattr(error, "exit_code") or _debugging():
            raise
        fail(explain(error))


def stop(kept: str = "") -> NoReturn:
    """Say that an interrupt ended the program, and what is kept, and end with a shell's code for that."""
    errors().print(Text(f"attnrb: stopped{kept}.", style="red"), soft_wrap=True)
    raise typer.Exit(INTERRUPTED) from None


def explain(error: Exception) -> str:
    """What happened, for a person, and what to do where that is known."""
    sentence = _explain(error)
    return f"{sentence}; {_FOR_UTF8}" if _took_text_for_ascii(error) else sentence


def _took_text_for_ascii(error: BaseException | None) -> bool:
    """Whether some file, be it a package's own, was read in the encoding of a locale that knows ASCII alone."""
    while error is not None:
        if isinstance(error, UnicodeDecodeError) and error.encoding == "ascii":
            return True
        error = error.__cause__ or error.__context__
    return False


def _explain(error: Exception) -> str:
    text = str(error).strip()
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing in _EXTRAS:
        return f"this needs the package {missing}: run `pip install 'attnrb[{_EXTRAS[missing]}]'`"
    # Errors of attnrb's own are sentences already.
    ours = type(error).__module__.partition(".")[0] == "attnrb"
    if ours or isinstance(error, (NotImplementedError, ImportError)):
        return text or type(error).__name__
    if isinstance(error, UnicodeError):
        return f"a text cannot be read or written as it is: {text}"
    if isinstance(error, (ValueError, TypeError)):
        return text or f"{type(error).__name__}; {_FOR_MORE}"
    if isinstance(error, OSError):
        what = error.strerror or text or type(error).__name__
        return f"{error.filename!r}: {what}" if error.filename is not None else what
    first = next(iter(text.splitlines()), "")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "not enough memory" in first:
        return f"memory is short ({first or 'there is none left'}); try a shorter text, a smaller batch or model"
    return f"{type(error).__name__}: {first}; attnrb did not foresee this error, {_FOR_MORE}"


def _debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print warnings of attnrb's own as sentences, without the line of code that gave them."""
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if str(_PACKAGE) not in filename:
            return before(message, category, filename, lineno, file, line)
        return warn(str(message))

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def is_first_process() -> bool:
    """Whether this process speaks for a run in several (``accelerate launch``); all may tell of their errors."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Show the step in progress and its time on a terminal; elsewhere a line a step, and one every 30 s.

    Yields what names a step.
    """
    console = errors()
    if not is_first_process():
        yield lambda _: None
        return
    if not console.is_terminal:
        dots = "..." if console.options.ascii_only else "…"
        with reminder(console) as remind:

            def step(name: str) -> None:
                console.print(Text(f"{name} {dots}"), soft_wrap=True)
                remind(f"{name} {dots}")

            yield step
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda step: progress.reset(task, description=step)


@contextlib.contextmanager
def reminder(console: Console) -> Iterator[Callable[[str], None]]:
    """Where there is no terminal: print what is at work every `LINE_SECONDS`, so that nobody takes silence for a stop.

    Yields what says it, which may be called as often as one likes.
    """
    doing = [""]
    start = [time.monotonic()]
    over = threading.Event()

    def say(what: str) -> None:
        doing[0] = what

    def lines() -> None:
        while not over.wait(LINE_SECONDS):
            if doing[0]:
                console.print(Text(f"{doing[0]} {duration(time.monotonic() - start[0])} so far"), soft_wrap=True)

    thread = threading.Thread(target=lines, daemon=True)
    thread.start()
    try:
        yield say
    finally:
        over.set()
        thread.join()


def duration(seconds: float) -> str:
    """For a person."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def quiet_transformers() -> None:
    """Silence the bars and warnings of transformers, which would break the layout; downloads keep theirs."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    enable_progress_bars()
