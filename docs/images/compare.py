"""Draw docs/images/compare.svg: what ``attnrb compare`` prints on a terminal of 104 columns.

.venv/bin/python docs/images/compare.py [the arguments of attnrb compare]
"""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

from attnrb.cli import app
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from typer.testing import CliRunner

PICTURE = Path(__file__).with_suffix(".svg")


def main(arguments: list[str]) -> None:
    """Run the command on a recording console and save the picture."""
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
    title = shlex.join(["attnrb", "compare", *arguments])
    PICTURE.write_text(console.export_svg(title=title, code_format=form, unique_id="compare"), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
