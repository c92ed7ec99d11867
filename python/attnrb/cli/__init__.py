"""The command line ``attnrb``, which the extra ``cli`` installs. The commands are in `attnrb.cli.app`."""

from __future__ import annotations

import sys
from typing import Any


def load() -> Any:
    """Import the command line; calling what is returned runs it with the arguments of the process."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        sys.exit(f"attnrb: the command line needs the package {error.name}: run `pip install 'attnrb[cli]'`")
    from attnrb.cli.app import app

    return app


def main() -> None:
    """Run the command line with the arguments of the process."""
    load()()
