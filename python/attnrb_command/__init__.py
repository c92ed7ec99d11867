"""The program ``attnrb``. It stands beside the package, whose import takes seconds in which an interrupt can come."""

from __future__ import annotations

import os
import signal
from types import FrameType

_INTERRUPTED = 130  # as a shell has it for a program that an interrupt ended


def _stop(number: int, frame: FrameType | None) -> None:
    # Nothing is at work yet, and an exception in the middle of an import may come out as any other.
    os.write(2, b"attnrb: stopped.\n")
    os._exit(_INTERRUPTED)


def main() -> None:
    """Import the command line and run it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    from attnrb.cli import load

    run = load()
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()
