"""pytest in a process of its own: for what is chosen once in a process, such as an instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from conftest import REPOSITORY


def passed(stems: Sequence[str], environment: Mapping[str, str]) -> str:
    """What pytest prints of the files ``test_STEM.py``, with more in its environment; all of their tests must pass."""
    files = [str(REPOSITORY / "tests" / "python" / f"test_{stem}.py") for stem in stems]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", *files],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    return ran.stdout
