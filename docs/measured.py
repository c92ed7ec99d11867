"""A hook of MkDocs: the picture of bench/history goes into docs/performance.md once results are stored.

docs/images/history.py draws the picture. Without one, the page has nothing in its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

PICTURE = Path(__file__).parent / "images" / "history.svg"
PLACE = "<!-- images/history.svg, where results are stored -->"
SHOWN = """![Time of attnrb over time of PyTorch in the same run, for each stored result](images/history.svg)

Each point is one stored run: the geometric mean, over the cases of a bench, of the time of attnrb over that of PyTorch.
"""


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any, picture: Path = PICTURE) -> str:
    """A page with the picture in its place, if there is one."""
    return markdown.replace(PLACE, SHOWN if picture.exists() else "")
