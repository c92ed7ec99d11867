"""Draws a ranking of heads, and the table of ``attnrb demo``, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from attnrb.reports.printable import printable

if TYPE_CHECKING:
    from attnrb.policies import HeadProfile
    from attnrb.studies.conflict import ConflictItem

_COLOURS = ("", "color(53)", "color(90)", "color(127)", "color(201)")


def heat_map(profile: HeadProfile, console: Console) -> Group:
    """Draw every head as a cell, the darker the larger its score, with a star on those that are kept.

    Layers stand below each other. Where a layer has more heads than fit, its line goes on in a further block.
    """
    shades = " .:=#" if console.options.ascii_only else " ░▒▓█"
    star = "*" if console.options.ascii_only else "★"
    best = max(max(row) for row in profile.scores)
    kept = profile.chosen
    block = max(1, (console.width - 4) // 3)
    lines = [
        Text(f"{profile.keep} of {profile.layers * profile.heads} heads are kept: {star}", style="bold"),
        Text(f"A cell's shade is its score, from 0 to {best:.3g} nats; heads stand beside each other.", style="dim"),
    ]
    for first in range(0, profile.heads, block):
        heads = range(first, min(first + block, profile.heads))
        lines.append(Text("    " + "".join(f"{head:<3}" for head in heads).rstrip(), style="dim"))
        for layer in range(profile.layers):
            line = Text(f"{layer:>3} ")
            for head in heads:
                score = profile.scores[layer][head]
                # The root spreads the many small scores out.
                level = 0 if score <= 0 or best <= 0 else min(4, int(4 * (score / best) ** 0.5 + 0.5))
                line.append(shades[level] * 2, style=_COLOURS[level])
                line.append(star if head in kept.get(layer, ()) else " ")
            line.rstrip()
            lines.append(line)
    return Group(*lines)


def conflict_table(example: ConflictItem, items: int, found: Mapping[str, int], seconds: float) -> Group:
    """Draw how many items were right in each arm, under one of the items."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("the model", overflow="fold")
    table.add_column("right", justify="right")
    table.add_column("", justify="right")
    for name, right in found.items():
        table.add_row(Text(name), f"{right} of {items}", f"{100 * right / items:.0f} %")
    prompt = Text(printable(example.older) + " ")
    prompt.append(printable(f"(({example.newer}))"), style="bold magenta")
    prompt.append(printable(f" {example.question}"))
    return Group(
        Text("Emphasis: which of two facts does the model go by?", style="bold"),
        prompt,
        Text(printable(f"right: {example.candidates[0]}   wrong: {example.candidates[1]}"), style="dim"),
        table,
        Text(
            f"Measured here in {seconds:.0f} s, by the likelihood of both answers. Emphasis decides which marked text "
            "an answer comes from; it makes no model wiser.",
            style="dim",
        ),
    )
