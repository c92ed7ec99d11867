"""``attnrb analyze``: where attention goes, on the terminal and in files."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from attnrb.cli import files, options
from attnrb.cli.console import duration, errors, output, reminder, steps, user_errors, write_json
from attnrb.cli.loading import Loading, load_model, takes_model
from attnrb.policies import model_shape
from attnrb.reports.printable import printable
from attnrb.text.reading import as_typed, check_text, parse_json, read_text

if TYPE_CHECKING:
    from attnrb.analysis import AttentionReport, AttentionRun, Detail
    from attnrb.analysis import Progress as AnalysisProgress
    from attnrb.policies import Policy

_INPUT = "What to analyse"
_TEXT_FILE = re.compile(r"\.(?:csv|htm|html|json|jsonl|log|md|py|rst|tex|text|tsv|txt|xml|yaml|yml)$", re.IGNORECASE)

_SHOWN_SINKS = 8
_COLUMNS = {
    "first_key": "first key",
    "non_semantic": "non-sem.",
    "entropy": "entropy",
    "mean_distance": "distance",
    "outliers_per_row": "outliers",
    "outlier_overlap": "overlap",
}


@takes_model
@options.takes_any_policy
def analyze(
    *,
    given: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...",
            help="As --text: files, or texts of several words; - reads standard input.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            "-t",
            help="A file, a .jsonl file of objects with a field text, a text of several words, or - for standard "
            "input. May be given again.",
            show_default=False,
            rich_help_panel=_INPUT,
        ),
    ] = None,
    text_string: Annotated[
        list[str] | None,
        typer.Option(help="The text itself. May be given again.", show_default=False, rich_help_panel=_INPUT),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Measure again, edited: default, alpha=0.3,normalize=true, emphasis(strength=8), a JSON object, a "
            ".json file, a model's folder, or learnt gains. --policy and --set say the same in parts.",
            show_default=False,
            rich_help_panel=_INPUT,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Another model to measure first, such as the one that --model was fine-tuned from.",
            show_default=False,
            rich_help_panel=_INPUT,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Wrap texts in the chat template.", rich_help_panel=_INPUT)
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=2, help="Read only this many tokens of each text.", show_default="never", rich_help_panel=_INPUT
        ),
    ] = None,
    keep_texts: Annotated[
        int,
        typer.Option(
            min=0, help="How many texts to show token by token; the figures are of all.", rich_help_panel=_INPUT
        ),
    ] = 8,
    function_words: Annotated[
        Path | None,
        typer.Option(
            help="File of function words, with spaces or lines between, for texts that are not English.",
            show_default=False,
            rich_help_panel=_INPUT,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Attention above which an entry is an outlier.", show_default="that of --compare, or 0.01"),
    ] = None,
    source_layer: Annotated[
        int | None,
        typer.Option(help="Layer whose outliers others are compared with.", show_default="that of --compare, or 0"),
    ] = None,
    z_threshold: Annotated[float, typer.Option(help="Robust z-score above which a token is an outlier.")] = 3.5,
    layers: Annotated[
        str | None, typer.Option(help="Layers whose heads the page shows one by one, like 0,12-14.", show_default="all")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Heads that the page shows one by one, like 0-3.", show_default="all")
    ] = None,
    rows_mb: Annotated[
        float, typer.Option(min=0, help="Megabytes of the page for where single tokens look; 0 leaves it out.")
    ] = 2.0,
    serve: Annotated[
        bool, typer.Option(help="Show the page to this machine alone, with every token's row; Ctrl-C ends it.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve.", show_default="any")] = 0,
    html: files.HtmlFile = None,
    json: files.JsonFile = None,
    csv: Annotated[
        Path | None,
        typer.Option(
            help="Every figure of each layer and head, as rows of a table.",
            show_default=False,
            rich_help_panel=files.PANEL,
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Folder for the plots.", show_default=False, rich_help_panel=files.PANEL)
    ] = None,
    policy: options.PolicyChoice,
    loading: Loading,
) -> None:
    """Measure where attention goes, in every layer and head."""
    with user_errors():
        chosen = _compared(compare, policy)
        texts = read_texts([*(given or []), *(text or [])], text_string or [])
        _check_outputs(html, json, csv, png, serve)
        detail = _detail(layers, heads, rows_mb)
        words = None if function_words is None else read_text(function_words).split()
        with steps() as step:
            loaded, tokenizer = load_model(loading, step)
            if chosen is not None:  # one that does not fit the model fails before minutes of work
                chosen.resolve(model_shape(loaded))
            base = None
            if baseline is not None:
                base, base_tokenizer = load_model(loading, step, model=baseline)
                _check_tokenizers(tokenizer, base_tokenizer, texts)
        from attnrb.analysis import analyze as run

        with _bar() as progress:
            report = run(
                loaded,
                tokenizer,
                [each.text for each in texts],
                compare=chosen,
                baseline=base,
                threshold=threshold,
                source_layer=source_layer,
                z_threshold=z_threshold,
                chat=chat,
                max_tokens=max_tokens,
                keep_texts=keep_texts,
                function_words=words,
                names=[each.name for each in texts],
                model_name=loading.options.name,
                baseline_name=replace(loading.options, model=baseline).name,
                detail=detail,
                keep_keys=serve,
                progress=progress,
            )
    if files.is_standard_output(json):
        write_json(report.to_json())
    else:
        show(output(), report)
    written = files.write_outputs(
        {json: report.to_json, html: report.to_html, csv: report.to_csv, png: report.save_plots}
    )
    if written:
        errors().print(Text(f"Wrote {', '.join(written)}"), soft_wrap=True)
    if serve:
        _serve(report, port)


def _detail(layers: str | None, heads: str | None, megabytes: float) -> Detail:
    """What the page shows of single heads."""
    from attnrb.analysis import Detail
    from attnrb.policies.parse import parse_layers

    def chosen(name: str, text: str | None) -> tuple[int, ...] | None:
        try:
            return None if text is None else tuple(parse_layers(text))
        except ValueError as error:
            raise ValueError(str(error).replace("layers:", f"{name}:", 1)) from None

    return Detail(chosen("layers", layers), chosen("heads", heads), megabytes)


def _serve(report: AttentionReport, port: int) -> None:
    from attnrb.analysis.serve import ReportServer

    with user_errors():
        try:
            server = ReportServer(report, port)
        except OSError as error:
            raise ValueError(f"port: {port} cannot be used: {error.strerror}") from error
    errors().print(Text(f"The page is at {server.address} until Ctrl-C."), soft_wrap=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve()


def _compared(compare: str | None, choice: options.PolicyChoice) -> Policy | None:
    """The policy that ``--compare``, or ``--policy`` and ``--set``, name."""
    from attnrb.policies.parse import parse_policy

    if compare is None:
        return choice.policy() if choice.given else None
    if choice.given:
        raise ValueError("compare: expected the policy once: by --compare, or by --policy and --set")
    try:
        return parse_policy(compare)
    except FileNotFoundError as error:
        raise ValueError(f"compare: {error}") from error


# --------------------------------------------------------------------------------------------------------- the texts


class NamedText(NamedTuple):
    """A text and what to call it."""

    name: str
    text: str


def read_texts(given: list[str], strings: list[str]) -> list[NamedText]:
    """The texts of ``--text`` and ``--text-string``.

    Raises:
        ValueError: there is none, a file cannot be read, or a text holds what is no character.
    """
    texts: list[NamedText] = []
    for each in given:
        if each == "-":
            texts.append(NamedText("standard input", files.standard_input()))
        elif _is_there(each):
            path = Path(each)
            texts += _json_lines(path) if path.suffix == ".jsonl" else [NamedText(path.name, read_text(path))]
        elif names_a_file(each):
            raise ValueError(f"text: there is no file {each!r}; --text-string takes a text as it is")
        else:
            texts.append(NamedText(f"text {len(texts) + 1}", as_typed(each)))
    texts += [NamedText(f"text {len(texts) + number}", as_typed(each)) for number, each in enumerate(strings, 1)]
    if not texts:
        raise ValueError(
            "text: expected a file, a text of several words or - for standard input, or --text-string with any text"
        )
    for named in texts:
        check_text(named.name, named.text)
    return texts


def names_a_file(text: str) -> bool:
    """Whether a text that is no file here was meant as the name of one: it is never analysed as a word.

    A word alone is taken for a name, unless its letters are of a script that puts no spaces between words; so is what
    ends like a text file.
    """
    if "\n" in text:
        return False
    if _TEXT_FILE.search(text) is not None:
        return True
    return (text.isascii() or "/" in text) and not any(character.isspace() for character in text)


def _is_there(name: str) -> bool:
    """Whether a file or folder has this name; a folder is then refused as it is read."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # a text longer than a name may be, or with a NUL in it
        return False


def _json_lines(path: Path) -> list[NamedText]:
    texts = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)["text"]
            if not isinstance(value, str):
                raise TypeError
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{str(path)!r}, line {number}: expected an object with a string named text") from error
        texts.append(NamedText(f"{path.name}:{number}", value))
    return texts


def _check_tokenizers(tokenizer: Any, other: Any, texts: list[NamedText]) -> None:
    for each in texts:
        sample = each.text[:20_000]
        if tokenizer(sample)["input_ids"] != other(sample)["input_ids"]:
            raise ValueError(
                f"baseline: its tokenizer cuts {each.name!r} into other tokens than the model's, so layers of the "
                "two cannot be compared"
            )


# --------------------------------------------------------------------------------------------------------- the files


def _check_outputs(html: Path | None, json: Path | None, csv: Path | None, png: Path | None, serve: bool) -> None:
    """Refuse what could not be written in the end, before the work begins."""
    if html is not None or serve:
        from attnrb.analysis.page import check_installed

        check_installed()
    if png is not None:
        from attnrb.analysis import plots

        plots.check_installed()
        if png.exists() and not png.is_dir():
            raise ValueError(f"png: {str(png)!r} is not a folder")
    files.check_outputs(html=html, json=json, csv=csv)


# --------------------------------------------------------------------------------------------------------- the terminal


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[AnalysisProgress], None]]:
    """A bar with the time left on a terminal; elsewhere a line every 30 s."""
    console = errors()
    if not console.is_terminal:
        with _lines(console) as line:
            yield line
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Analysing", total=1.0)

        def tell(now: AnalysisProgress) -> None:
            progress.update(
                task, total=now.texts, completed=now.text + now.fraction, description=f"Analysing {_which(now)}"
            )

        yield tell


@contextlib.contextmanager
def _lines(console: Console) -> Iterator[Callable[[AnalysisProgress], None]]:
    """What is at work and how much of it is done, every 30 s."""
    start = time.monotonic()
    with reminder(console) as remind:

        def tell(now: AnalysisProgress) -> None:
            done = (now.text + now.fraction) / now.texts if now.texts else 0.0
            left = f", {duration((time.monotonic() - start) * (1 - done) / done)} left" if done > 0 else ""
            remind(f"Analysing {_which(now)}: {100 * done:.0f} %{left};")

        yield tell


def _which(now: AnalysisProgress) -> str:
    which = f"text {now.text + 1} of {now.texts}" if now.texts and now.texts > 1 else "text"
    return f"{which}, {now.tokens:,} tokens, {now.run}"


def show(console: Console, report: AttentionReport) -> None:
    """Print the means of every layer and the strongest sinks."""
    names = " and ".join(dict.fromkeys(run.model for run in report.runs))
    texts = f"{report.text_count:,} text{'s' if report.text_count > 1 else ''}, {report.token_count:,} tokens"
    console.print(Text(printable(f"{names}, {report.dtype}: {texts}"), style="bold"))
    for note in report.notes:
        console.print(Text(printable(note), style="yellow"))
    console.print(_layer_table(console, report))
    for run in report.runs:
        console.print(_sink_table(report, run))


def _layer_table(console: Console, report: AttentionReport) -> Table:
    """A row for each layer; the values of several runs stand above each other."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    if len(report.runs) > 1:
        table.add_column("", no_wrap=True)
    for title in _COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    means = [{name: run.layer_means(name) for name in _COLUMNS} for run in report.runs]
    for place, layer in enumerate(report.layers):
        _add_rows(table, report, str(layer), [{name: each[name][place] for name in _COLUMNS} for each in means])
    table.add_section()
    _add_rows(table, report, "mean", [{name: run.mean(name) for name in _COLUMNS} for run in report.runs])
    return table


def _add_rows(table: Table, report: AttentionReport, title: str, values: list[dict[str, Any]]) -> None:
    for run, of_run in zip(report.runs, values, strict=True):
        label = [run.label] if len(report.runs) > 1 else []
        style = "" if run is report.runs[0] else "magenta"
        cells = [Text(_figure(name, value), style=style) for name, value in of_run.items()]
        table.add_row(title if run is report.runs[0] else "", *label, *cells)


def _figure(name: str, value: float | None) -> str:
    if value is None or value != value:
        return "-"
    return f"{100 * value:.1f} %" if name in ("first_key", "non_semantic") else f"{value:.2f}"


def _sink_table(report: AttentionReport, run: AttentionRun) -> Table | Text:
    from attnrb.analysis.words import ranges, visible

    title = f"Sinks, {run.label}" if len(report.runs) > 1 else "Sinks"
    if not run.sinks:
        return Text(f"{title}: none")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for name in ("token", "class", "places", "layers", "peak share", "at layer", "z-score"):
        words = name in ("token", "class", "layers")
        table.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=name == "class")
    for sink in run.sinks[:_SHOWN_SINKS]:
        table.add_row(
            Text(visible(sink.text)),
            sink.token_class.replace("_", " "),
            "first" if sink.is_first else f"{sink.count:,}",
            ranges(sink.layers),
            f"{100 * sink.peak_share:.1f} %",
            str(sink.peak_layer),
            f"{sink.z_score:.1f}",
        )
    return table
