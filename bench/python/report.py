"""The results as a plain table."""

from __future__ import annotations

from typing import Any

_LAYOUT = "{:<38} {:>9} {:<17} {:>9} {:>7} {:>8}  {:<6} {:>15} {:>8} {:>6} {:>6} {:>8}"

HEADER = _LAYOUT.format(
    "case", "attnrb ms", "against", "its ms", "ratio", "bar", "holds", "rate", "limit", "share", "out/row", "dropped"
)


def lines(result: dict[str, Any]) -> list[str]:
    """One line for each bar; what belongs to the case as a whole stands in the first."""
    own = result["seconds"]["attnrb"]
    table = []
    for index, bar in enumerate(result["bars"]):
        against = result["seconds"].get(bar["against"])
        limit = f">= {bar['at_least']:.2f}" if "at_least" in bar else f"<= {bar['at_most']:.2f}"
        first = index == 0
        line = _LAYOUT.format(
            result["name"] if first else "",
            _milliseconds(own["fastest"]) if first else "",
            bar["against"],
            _milliseconds(against["fastest"]) if against else "",
            f"{bar['is']:.2f}",
            limit,
            "yes" if bar["holds"] else "NO",
            f"{result['rate']:.1f} {result['unit']}" if first else "",
            f"{result['limit']:.0f}" if first else "",
            f"{result['rate'] / result['limit']:.0%}" if first else "",
            f"{result['outliers_a_row']:.1f}" if first else "",
            f"{own['dropped']}/{own['dropped'] + own['rounds']}" if first else "",
        )
        table.append(line.rstrip())
    return table


def verdict(results: list[dict[str, Any]]) -> str:
    bars = [bar for result in results for bar in result["bars"]]
    held = sum(bar["holds"] for bar in bars)
    return f"{held} of {len(bars)} bars hold"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.01 else f"{seconds * 1e3:.1f}"
