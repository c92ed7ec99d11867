"""Makes ``cards.jsonl``: stock cards of a fastener warehouse, each with the same fields, the same bytes every time.

    python examples/make_cards.py            # writes examples/cards.jsonl
    python examples/make_cards.py --check    # exit code 1 where the file differs

The warehouse is made up. On each card some fields are drawn (family, size, length, material, finish, pack) and the
others follow from them by a rule, so that there is something to learn beyond the layout: the number from the drawn
fields, pitch and width across flats from the size (coarse ISO metric threads), the mass from the volume, the torque
from size and material, the price from the mass, the shelf from family and size.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

CARDS = 2500
SEED = 20240314
PATH = Path(__file__).with_name("cards.jsonl")

# Nominal diameter in mm: pitch and width across flats in mm.
SIZES = {
    3: (0.5, 5.5),
    4: (0.7, 7),
    5: (0.8, 8),
    6: (1, 10),
    8: (1.25, 13),
    10: (1.5, 16),
    12: (1.75, 18),
    16: (2, 24),
    20: (2.5, 30),
}
# Name: code, head volume as a multiple of diameter³.
FAMILIES = {
    "hex bolt": ("HB", 1.1),
    "socket screw": ("SS", 1.4),
    "countersunk screw": ("CS", 0.7),
    "carriage bolt": ("CB", 1.2),
    "threaded rod": ("TR", 0.0),
    "set screw": ("ST", 0.0),
}
# Name: code, density in g/cm³, strength in MPa, price in cents a gram.
MATERIALS = {
    "steel 8.8": ("88", 7.85, 640, 0.9),
    "steel 10.9": ("109", 7.85, 940, 1.2),
    "stainless A2": ("A2", 7.9, 450, 2.6),
    "brass": ("BR", 8.5, 200, 3.4),
    "polyamide": ("PA", 1.14, 40, 6.5),
}
FINISHES = ("plain", "zinc plated", "black oxide", "waxed")
LENGTHS = (2, 2.5, 3, 4, 5, 6, 8, 10, 12)  # multiples of the diameter
PACKS = (10, 25, 50, 100, 200)

Chosen = TypeVar("Chosen")


def cards(count: int = CARDS, seed: int = SEED) -> Iterator[dict[str, str | int | float]]:
    """That many different cards."""
    source = random.Random(seed)

    # random() is the one method whose numbers Python promises not to change.
    def draw(choices: Sequence[Chosen]) -> Chosen:
        return choices[int(source.random() * len(choices))]

    seen: set[tuple[str, int, float, str, str, int]] = set()
    while len(seen) < count:
        drawn = (
            draw(tuple(FAMILIES)),
            draw(tuple(SIZES)),
            draw(LENGTHS),
            draw(tuple(MATERIALS)),
            draw(FINISHES),
            draw(PACKS),
        )
        if drawn not in seen:
            seen.add(drawn)
            yield card(*drawn)


def card(family: str, size: int, lengths: float, material: str, finish: str, pack: int) -> dict[str, str | int | float]:
    """The card that these six choices make; `lengths` counts diameters."""
    family_code, head = FAMILIES[family]
    pitch, flats = SIZES[size]
    material_code, density, strength, cents = MATERIALS[material]
    length = int(lengths * size)
    volume = math.pi / 4 * (size - 0.6 * pitch) ** 2 * length + head * size**3
    mass = density * volume / 1000
    torque = 0.2 * 0.75 * strength * 0.8 * size**3 / 1000
    return {
        "number": f"{family_code}-{size:02}-{length:03}-{material_code}{finish[0].upper()}",
        "name": f"{family} M{size} x {length}",
        "family": family,
        "material": material,
        "finish": finish,
        "thread": f"M{size}",
        "pitch": f"{pitch} mm",
        "length": f"{length} mm",
        "across flats": f"{flats} mm" if head else "none",
        "mass": f"{mass:.3g} g",
        "torque": f"{torque:.3g} Nm",
        "pack": pack,
        "pack mass": f"{mass * pack / 1000:.2f} kg",
        "price": f"{max(0.02, mass * cents / 100) * pack:.2f}",
        "shelf": f"{chr(ord('A') + tuple(FAMILIES).index(family))}{size:02}-{1 + length // 25}",
    }


def document(count: int = CARDS, seed: int = SEED) -> str:
    """The file: a JSON object a line."""
    return "".join(json.dumps(each, separators=(",", ":")) + "\n" for each in cards(count, seed))


def main() -> int:
    """Write or check the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=PATH, help="where to (default: beside this script)")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args()
    if not options.check:
        options.output.write_bytes(document().encode())
        return 0
    same = options.output.is_file() and options.output.read_bytes() == document().encode()
    print(f"{options.output}: {'as this script makes it' if same else 'not what this script makes'}")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
