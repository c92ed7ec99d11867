"""Print what an extra of pyproject.toml needs, a line each: ``extra.py NAME``; itself aside."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:  # pip has read such files since before Python did
    from pip._vendor import tomli as tomllib

if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    print("\n".join(each for each in project["optional-dependencies"][sys.argv[1]] if not each.startswith("attnrb")))
