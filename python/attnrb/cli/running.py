"""What ``attnrb eval`` and ``attnrb search`` share: options, how a run starts, progress with the time left, errors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from attnrb.cli.console import (
    duration,
    errors,
    is_first_process,
    quiet_transformers,
    reminder,
    steps,
    stop,
    user_errors,
)
from attnrb.cli.files import PANEL, is_standard_output, write_outputs
from attnrb.cli.loading import Loading, set_threads
from attnrb.reports.printable import printable
from attnrb.text.reading import is_whole_number

if TYPE_CHECKING:
    from attnrb.evaluation.plan import TaskPlan
    from attnrb.evaluation.runner import Progress
    from attnrb.evaluation.selection import Selected

ITEMS = "Items"
ASKING = "How they are asked"

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
IncludePath = Annotated[
    Path | None,
    typer.Option(
        help="Folder of task files (.yaml) of your own for the harness.", show_default=False, rich_help_panel=ITEMS
    ),
]
Generated = Annotated[
    bool,
    typer.Option(
        "--generated",
        help="Generate the answers of direct prompting, rather than score the choices.",
        rich_help_panel=ASKING,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Seed of what is drawn: order and split of items, the sampler, the bootstrap.",
        rich_help_panel="Model and run",
    ),
]
Shots = Annotated[
    int, typer.Option(min=0, help="Examples before each question, for direct prompting.", rich_help_panel=ASKING)
]
Chat = Annotated[bool, typer.Option("--chat/--no-chat", help="Use the model's chat template.", rich_help_panel=ASKING)]
BatchSize = Annotated[str, typer.Option(help="Questions at a time, or auto.", rich_help_panel="Model and run")]
_ENGINES = ("transformers", "vllm")
Engine = Annotated[
    str, typer.Option(help="What scores the choices: transformers, or vllm.", rich_help_panel="Model and run")
]
RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="File of finished items. Where it exists, the run continues.",
        show_default="beside --json, else named by the settings",
        rich_help_panel=PANEL,
    ),
]


def batch_size(text: str) -> int | str:
    """Of the option ``--batch-size``. Raises ValueError for what is neither a number above 0 nor ``auto``."""
    if text == "auto":
        return text
    if not is_whole_number(text) or int(text) < 1:
        raise ValueError(f"batch_size: expected auto, or a number of 1 or above, got {text!r}")
    return int(text)


def run_file(run: Path | None, json: Path | None, named: Path) -> Path:
    """Where finished items go: where ``--run`` says, beside the report, or where the settings name a file."""
    if run is not None:
        return run
    if json is None or is_standard_output(json):
        return named
    return json.with_name(f"{json.stem}.items.jsonl")


def model_name(model: str | None) -> str:
    """What reports call a model."""
    from attnrb.models.options import DEFAULT_MODEL_NAME, read_model_name

    return read_model_name(model).model or DEFAULT_MODEL_NAME


def check_engine(engine: str, *, generates: bool) -> None:
    """Raises ValueError for an engine that is unknown, or cannot do what is asked for."""
    if engine not in _ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(_ENGINES)}, got {engine!r}")
    if engine == "vllm" and generates:
        raise ValueError("engine: vllm scores choices and writes no text; take --engine transformers")


def start(
    plan: TaskPlan, run: Path, loading: Loading, rows: int | str, *, engine: str = "transformers"
) -> tuple[Any, tuple[Selected, ...]]:
    """The harness' model, plain, and the tasks. Files come first: what is wrong with one is known at once."""
    loading.options.check()
    with steps() as step:
        step("Reading the items")
        from attnrb.evaluation.grid import check_run, quiet

        if is_first_process():  # which alone locks the file
            check_run(run, plan)
        quiet()
        selected = plan.select()
        step("Starting")
        set_threads(loading.threads)
        quiet_transformers()
        step(f"Loading {model_name(loading.options.model)}")
        loaded: Any
        if engine == "vllm":
            from attnrb.hosts.lm_eval.vllm import VllmLM as loaded  # noqa: N813 (either class)
        else:
            from attnrb.hosts.lm_eval.model import AttnrbLM as loaded  # noqa: N813
        return loaded(loading.options.model, plain=True, batch_size=rows, **loading.options.arguments()), selected


def write(reports: Mapping[Path | None, Callable[[], str]]) -> None:
    """Write each report that is asked for, whole or not at all."""
    from attnrb.reports.files import write_whole

    def writer(content: Callable[[], str]) -> Callable[[Path], object]:
        return lambda path: write_whole(path, content())

    kept = "; the finished items are kept, and the same command writes it from them"
    write_outputs({path: writer(content) for path, content in reports.items()}, kept=kept)


def tell_step(step: str) -> None:
    """Say what comes next, on a line of its own."""
    if is_first_process():
        console = errors()
        dots = "..." if console.options.ascii_only else "…"
        console.print(Text(f"{printable(step)} {dots}"), soft_wrap=True)


@contextlib.contextmanager
def run_errors(place: Sequence[Path]) -> Iterator[None]:
    """`user_errors`, and for an interrupt a word of what is kept; `place` comes to hold the run's file."""
    with user_errors():
        try:
            yield
        except KeyboardInterrupt:
            exists = place and place[0].exists()
            stop(f": finished items are in {place[0]}, and the same command continues" if exists else "")


class _TimeLeft:
    """How long the questions at hand still take, by how fast they went since they were told first."""

    def __init__(self) -> None:
        self._first: Progress | None = None  # of the questions at hand
        self._start = 0.0
        self._work_done = 0

    def __call__(self, state: Progress) -> str:
        others = self._first is None or state.work != self._first.work or state.work_done < self._work_done
        if self._first is None or others:
            self._first, self._start = state, time.monotonic()
        self._work_done = state.work_done
        if state.done >= state.total:
            return "done"
        done, elapsed = state.work_done - self._first.work_done, time.monotonic() - self._start
        return f"{duration(elapsed * (state.work - state.work_done) / done)} left" if done > 0 else ""


@contextlib.contextmanager
def progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left on a terminal, a line now and then elsewhere."""
    console = errors()
    left = _TimeLeft()

    if not is_first_process():
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
                    count=_answers(state) if state.total > 1 else "",
                    left=left(state),
                )

            yield show
    else:
        first_line = [True]
        # A block of answers may take minutes, so the lines come by the clock.
        with reminder(console) as remind:

            def tell(state: Progress) -> None:
                line = f"{_answers(state)}, {left(state) or state.doing}" if state.total > 1 else state.doing
                remind("" if state.done >= state.total else f"{line};")
                if first_line or state.done >= state.total:
                    first_line.clear()
                    console.print(Text(line), soft_wrap=True)

            yield tell


def _answers(state: Progress) -> str:
    return f"{state.done:,} of {state.total:,} answers"
