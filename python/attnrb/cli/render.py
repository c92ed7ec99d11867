"""Draws results on a terminal. Colour only repeats what characters say, so nothing is lost without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from attnrb.cli.console import errors, printable
from attnrb.generation import Generation, decode

if TYPE_CHECKING:
    from attnrb.compare import Comparison
    from attnrb.selfbench import Report

_PLAIN = "cyan"
_REBALANCED = "magenta"
_NARROWEST_PAIR = 56  # columns under which two texts side by side become unreadable


def comparison(console: Console, result: Comparison, tokenizer: Any, about: Mapping[str, Any]) -> None:
    """Print what `attnrb.compare.compare` found."""
    console.print(_heading(result, about))
    console.print()
    texts = [
        _marked(tokenizer, generation, result.first_difference, colour)
        for generation, colour in ((result.plain, _PLAIN), (result.rebalanced, _REBALANCED))
    ]
    console.print(_side_by_side(console.width, texts, [_speed(result.plain), _speed(result.rebalanced)]))
    console.print(_difference(result))
    console.print()
    console.print(first_key_chart(result.first_key_plain, result.first_key_rebalanced, console))
    tokens = result.prompt_tokens + len(result.plain.token_ids)
    if tokens * result.config.threshold < 2 and not result.config.boost_all:
        # Below 1 / threshold keys even an even spread is above the threshold.
        console.print(
            Text(
                f"In a text as short as this ({tokens} tokens) most weights exceed the threshold, those on the first key "
                "too, so that it gains with the others.",
                style="dim",
            )
        )


def _heading(result: Comparison, about: Mapping[str, Any]) -> Table:
    config = result.config
    depth = "" if config.depth is None else f", depth {config.depth:g}"
    extras = [name for name, on in (("normalised", config.normalize), ("every entry", config.boost_all)) if on]
    choice = "greedy" if about["temperature"] == 0 else f"temperature {about['temperature']:g}, seed {about['seed']}"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("prompt", Text(printable(result.prompt)))
    table.add_row("model", Text(printable(f"{about['model']}, {about['dtype']}, {about['threads']} threads, {choice}")))
    table.add_row(
        "method",
        Text(", ".join([f"alpha {config.alpha:g}, threshold {config.threshold:g}{depth}", *extras])),
    )
    found = "" if config.boost_all else f"{result.outliers_per_row:.1f} a row ({result.rows:,} rows), "
    table.add_row("outliers", Text(f"{found}{result.rebalanced_layers} layers re-balanced"))
    return table


def _speed(generation: Generation) -> Text:
    tokens = f"{len(generation.token_ids)} tokens"
    rate = "" if generation.tokens_per_second is None else f", {generation.tokens_per_second:.1f} tokens/s"
    return Text(tokens + rate, style="dim")


def _side_by_side(width: int, texts: Sequence[Text], speeds: Sequence[Text]) -> RenderableType:
    titles = [Text("without", style=f"bold {_PLAIN}"), Text("with re-balancing", style=f"bold {_REBALANCED}")]
    if width < _NARROWEST_PAIR:
        return Group(
            *(Panel(Group(text, speed), title=title) for title, text, speed in zip(titles, texts, speeds, strict=True))
        )
    table = Table(box=box.ROUNDED, expand=True, show_footer=True)
    for title, speed in zip(titles, speeds, strict=True):
        table.add_column(title, speed, ratio=1)
    table.add_row(*texts)
    return table


def _marked(tokenizer: Any, generation: Generation, at: int | None, colour: str) -> Text:
    """The text, its token number `at` set off by a mark and by style."""
    if at is None:
        return Text(printable(generation.text))
    ids = generation.token_ids
    start = _common(decode(tokenizer, ids[:at]), generation.text)
    end = max(_common(decode(tokenizer, ids[: at + 1]), generation.text), start)
    before, token, after = generation.text[:start], generation.text[start:end], generation.text[end:]
    gap = token[: len(token) - len(token.lstrip())]
    text = Text(printable(before + gap))
    text.append("▶", style=f"bold {colour}")
    text.append(printable(token[len(gap) :]) or "(ends here)", style=f"bold {colour} underline")
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


def _difference(result: Comparison) -> Text:
    at = result.first_difference
    if at is None:
        return Text("▶ no token differs")
    return Text(f"▶ first differing token: number {at + 1}")


def first_key_chart(plain: Sequence[float], rebalanced: Sequence[float], console: Console) -> Group:
    """Two bars a layer on one line, in upper and lower halves of the characters, with both numbers."""
    numbers = 15  # "100.0 → 100.0 %"
    room = max(8, min(console.width, 100) - numbers - 6)
    top = max([*plain, *rebalanced, 1e-9])
    colour = console.is_terminal and not console.no_color
    ascii_only = console.options.ascii_only
    arrow = "->" if ascii_only else "→"

    legend = Text("Attention on the first key, by layer", style="bold")
    legend.append("   ")
    legend.append("' " if ascii_only else "▀ ", style=_PLAIN)
    legend.append("without  ", style="not bold")
    legend.append(". " if ascii_only else "▄ ", style=_REBALANCED)
    legend.append("with", style="not bold")

    lines = [legend]
    for layer, (before, after) in enumerate(zip(plain, rebalanced, strict=True)):
        upper, lower = round(before / top * room), round(after / top * room)
        both = min(upper, lower)
        line = Text(f"{layer:>3} ")
        if ascii_only:
            line.append("=" * both + ("'" * (upper - both) or "." * (lower - both)))
        else:
            line.append("▀" * both if colour else "█" * both, style=f"{_PLAIN} on {_REBALANCED}" if colour else "")
            line.append("▀" * (upper - both), style=_PLAIN)
            line.append("▄" * (lower - both), style=_REBALANCED)
        line.append(" " * (room - max(upper, lower) + 1))
        line.append(f"{100 * before:5.1f} {arrow} {100 * after:.1f} %")
        lines.append(line)
    means = [100 * sum(shares) / max(len(shares), 1) for shares in (plain, rebalanced)]
    lines.append(Text(f"mean{' ' * (room + 1)}{means[0]:5.1f} {arrow} {means[1]:.1f} %", style="bold"))
    return Group(*lines)


def generation(result: Generation, stats: Any | None) -> None:
    """Print the speed of a generation on stderr, apart from its text."""
    line = _speed(result)
    if stats is not None:
        found = f", {stats.outliers_per_row:.1f} outliers a row" if stats.rows else ""
        line.append(f"{found}, {stats.layers} layers re-balanced")
    errors().print(line, soft_wrap=True)


def facts(console: Console, values: Mapping[str, Any]) -> None:
    """Print what `attnrb.about.about` returns, a line each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        if isinstance(value, Mapping):
            for inner, detail in value.items():
                table.add_row(Text(f"{name}: {inner}".replace("_", " ")), Text(_words(detail)))
        else:
            table.add_row(Text(name if name.isupper() else name.replace("_", " ")), Text(_words(value)))
    console.print(table)


def _words(value: Any) -> str:
    if value is None:
        return "not found"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return printable(str(value))


def bench(console: Console, report: Report) -> None:
    """Print what `attnrb.selfbench.run` measured."""
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
