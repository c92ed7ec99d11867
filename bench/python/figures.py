"""What every bench begins and ends with: its usual options, the machine's description, the stored figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def option_parser(
    description: str | None, *, quick: str | None = None, seconds: tuple[float, str] | None = None, model: bool = False
) -> argparse.ArgumentParser:
    """A parser with --threads, --json and what else is named: --quick (what it cuts), --seconds (of what), --model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help=f"{quick}: a look, not a figure")
    if model:
        parser.add_argument("--model", default=None, help="hub id, folder or .gguf file (default: the embedded model)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default: 2)")
    if seconds is not None:
        default, of = seconds
        parser.add_argument("--seconds", type=float, default=default, help=f"of timing {of} (default: {default:g})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the figures here")
    return parser


class Figures:
    """The figures of one run, with the machine they come from."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Set torch's threads and print what machine this is."""
        import torch
        from machine import describe, headline

        torch.set_num_threads(options.threads)
        self._options = options
        self.description = describe()
        print(headline(self.description))

    def store(self, **figures: Any) -> None:
        """Write them to the file that --json names, if it names one."""
        path: Path | None = self._options.json
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self._head() | figures, indent=1) + "\n")

    def stored(self) -> list[dict[str, Any]]:
        """The cases that a run before this one finished, on the same machine with the same versions; else none."""
        path: Path | None = self._options.json
        if path is None or not path.exists():
            return []
        found = json.loads(path.read_text())
        same = all(found.get(name) == value for name, value in self._head().items() if name != "command")
        return list(found.get("cases", [])) if same else []

    def _head(self) -> dict[str, Any]:
        """What stands before the figures."""
        return self.description | ({"quick": self._options.quick} if "quick" in self._options else {})
