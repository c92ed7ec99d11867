"""The Hugging Face hub, asked only where it can answer.

Without a network huggingface_hub tries again and again, for half a minute, before it says that a name is unknown. So a
name that is not here is looked up in the hub's own cache first, and the hub is called once to see whether it answers.
"""

from __future__ import annotations

import difflib
import os
import socket
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from attnrb.models.checkpoint import ModelError
from attnrb.models.options import DEFAULT_MODEL_NAME

__all__ = ["only_here"]

_SECONDS = 4.0  # to find the hub's address, and again to reach it


def only_here(name: str, file: str, revision: str | None, options: Mapping[str, Any]) -> bool:
    """Whether a model of the hub must be read from the hub's cache on this machine, since nothing else answers.

    Args:
        name: the hub id.
        file: one of its files that every load reads.
        revision: branch, tag or commit.
        options: arguments of ``from_pretrained``, such as ``cache_dir`` and ``local_files_only``.

    Raises:
        ModelError: it is not in the cache, and the hub cannot be asked.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    offline = bool(constants.HF_HUB_OFFLINE or options.get("local_files_only"))
    kept = try_to_load_from_cache(name, file, cache_dir=options.get("cache_dir"), revision=revision)
    if not offline and reachable(constants.ENDPOINT):
        return False
    if isinstance(kept, str):
        return True
    why = "is turned off (HF_HUB_OFFLINE or local_files_only)" if offline else "cannot be reached from here"
    raise ModelError(
        f"model: {name!r} is neither a file nor a folder here{_near(name)}, it is not in the Hugging Face hub's cache, "
        f"and the hub {why}"
    )


def reachable(endpoint: str) -> bool:
    """Whether the hub's address answers; with a proxy between, whether it does is the proxy's to say."""
    if {"https", "http", "all"} & set(urllib.request.getproxies()):
        return True
    place = urlsplit(endpoint)
    answered: list[bool] = []

    def call() -> None:
        try:
            port = place.port or (80 if place.scheme == "http" else 443)
            socket.create_connection((place.hostname or "", port), _SECONDS).close()
            answered.append(True)
        except OSError:
            pass

    # In a thread: looking up a name has no limit of its own.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(2 * _SECONDS)
    return bool(answered)


def _near(name: str) -> str:
    """What somebody may have meant: a folder beside, a file of weights, or the default model."""
    folder, _, last = name.rpartition("/")
    try:
        here = [
            os.path.join(folder, each.name)
            for each in Path(folder or ".").iterdir()
            if each.is_dir() or each.suffix == ".gguf"
        ]
    except OSError:
        here = []
    known = {each.lower(): f"./{each}" for each in here}
    if not folder:
        known |= {each.lower(): each for each in ("smollm2", DEFAULT_MODEL_NAME)}
    close = difflib.get_close_matches(name.lower(), known, n=2) or difflib.get_close_matches(last.lower(), known, n=1)
    return f" (did you mean {' or '.join(known[each] for each in close)}?)" if close else ""
