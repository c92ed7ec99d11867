"""Draw docs/images/compare.svg and emphasis.svg: what ``attnrb compare`` prints on a terminal of 104 columns.

.venv/bin/python docs/images/compare.py [compare | emphasis]
"""

from __future__ import annotations

import io
import re
import shlex
import sys
import textwrap
from pathlib import Path
from unittest import mock

from attnrb.cli import app
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from typer.testing import CliRunner

TWO_FACTS = (
    "The farmers around Quenby grow corn. ((Since the drought they have changed to cotton.)) "
    "The farmers around Quenby grow"
)
PICTURES = {
    "compare": [],
    "emphasis": ["--no-chat", "--max-new-tokens", "24", "--policy", "emphasis", "--set", "strength=16", TWO_FACTS],
}


def draw(name: str, arguments: list[str]) -> None:
    """Run the command with these arguments on a recording console and save the picture."""
    console = Console(
        width=104, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False
    )
    with mock.patch.object(app, "output", return_value=console):
        result = CliRunner().invoke(app.app, ["compare", *arguments])
    if result.exit_code != 0:
        sys.exit(result.stderr)
    # Rich's own picture loads its font over the network; this one takes what the reader's machine has.
    form = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    form = form.replace("Fira Code, monospace", "ui-monospace, DejaVu Sans Mono, Menlo, Consolas, monospace")
    form = form.replace("<svg ", '<svg xml:space="preserve" ', 1)  # some viewers drop the spaces a line begins with
    title = textwrap.shorten(shlex.join(["attnrb", "compare", *arguments]), 90, placeholder=" …'")
    picture = console.export_svg(title=title, code_format=form, unique_id=name)
    # How fast this machine was while the picture was drawn is not what it shows.
    picture = re.sub(
        r",&#160;[\d.]+&#160;tokens/s", lambda speed: "&#160;" * len(speed[0].replace("&#160;", " ")), picture
    )
    Path(__file__).with_name(f"{name}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or PICTURES:
        draw(chosen, PICTURES[chosen])
