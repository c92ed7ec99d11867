"""Servers on loopback, in processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import engines  # noqa: F401 (settings of vLLM, which a server inherits)
import httpx


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def serving(model: Path | str, port: int, options: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``attnrb serve`` with these options, once it answers; ended behind it.

    Raises:
        RuntimeError: it ended, or did not answer within ten minutes. The message has the end of its log.
    """
    command = [sys.executable, "-m", "attnrb", "serve", str(model), "--port", str(port), *options]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as said:
        running = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
    try:
        if not _answers(running, port):
            raise RuntimeError(log.read_text("utf-8", "replace")[-4000:])
        yield running
    finally:
        running.terminate()
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def _answers(running: subprocess.Popen[bytes], port: int) -> bool:
    end = time.monotonic() + 600
    while running.poll() is None and time.monotonic() < end:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return True
        except httpx.HTTPError:
            time.sleep(1)
    return False
