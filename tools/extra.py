"""Print what an extra of pyproject.toml needs, a line each: ``extra.py NAME``."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:  # pip has read such files since before Python did
    from pip._vendor import tomli as tomllib

EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]


def needs(extra: str) -> list[str]:
    """Requirements of an extra and of those that it takes in."""
    found = []
    for each in EXTRAS[extra]:
        found += needs(each[len("attnrb[") : -1]) if each.startswith("attnrb[") else [each]
    return found


if __name__ == "__main__":
    print("\n".join(needs(sys.argv[1])))
