"""Where a profile of heads transfers: profiles made on each task, tried on all of them.

    python -m attnrb.studies.transfer [--model MODEL] [--items 24] [--strength 16] [--keep 32] [--json FILE]

It prints a table in Markdown. Profiles come from development items, the figures from held-out ones.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnrb.policies.emphasis import Emphasis
from attnrb.policies.profile import HeadProfile
from attnrb.studies.conflict import score_items
from attnrb.studies.profile import profile_heads
from attnrb.studies.tasks import TASKS, task_examples, task_items

__all__ = ["random_heads", "transfer", "transfer_table"]

_EXAMPLES = 12


def random_heads(profile: HeadProfile, seed: int = 0) -> HeadProfile:
    """As many heads as a profile keeps, drawn by chance: what a ranking has to beat."""
    draw = random.Random(seed)
    scores = [[draw.random() for _ in range(profile.heads)] for _ in range(profile.layers)]
    return HeadProfile(scores, profile.keep, {"drawn": seed})


def transfer(
    model: Any,
    tokenizer: Any,
    *,
    items: int = 24,
    strength: float = 16.0,
    keep: int = 32,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, int]]:
    """How many items of each task are right, without emphasis and with it in several choices of heads.

    Args:
        model: an unpatched ``transformers`` causal language model. It is left as it was.
        tokenizer: its tokenizer.
        items: of each task, held out.
        strength: of `attnrb.Emphasis`.
        keep: how many heads a profile chooses.
        progress: called with a short line before each step.

    Returns:
        By choice of heads (``"none"``, ``"all"``, ``"random"``, and each task whose profile it is) and by task.
    """
    say = progress or (lambda _: None)
    choices: dict[str, Any] = {"none": None, "all": Emphasis(strength=strength)}
    for task in TASKS:
        say(f"Profile of {task}")
        profile = profile_heads(model, tokenizer, None, task_examples(tokenizer, task, _EXAMPLES), keep)
        choices.setdefault("random", Emphasis(strength=strength, heads=random_heads(profile)))
        choices[task] = Emphasis(strength=strength, heads=profile)
    found: dict[str, dict[str, int]] = {}
    for heads, policy in choices.items():
        found[heads] = {}
        for task in TASKS:
            say(f"Heads {heads}, task {task}")
            markup = "none" if policy is None else "span"
            found[heads][task] = score_items(model, tokenizer, task_items(task, items), policy, markup).right
    return found


def transfer_table(found: dict[str, dict[str, int]], items: int) -> str:
    """What `transfer` found, in Markdown: a line for each choice of heads, in percent."""
    names = {"none": "no emphasis", "all": "all", "random": "random"}
    lines = ["| heads | " + " | ".join(TASKS) + " |", "| --- |" + " ---: |" * len(TASKS)]
    for heads, right in found.items():
        cells = [f"{100 * right[task] / items:.0f} %" for task in TASKS]
        lines.append(f"| {names.get(heads, f'profile of {heads}')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub id, a folder or a .gguf file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--strength", type=float, default=16.0)
    parser.add_argument("--keep", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    import sys

    from attnrb.models import load

    def say(step: str) -> None:
        print(step, file=sys.stderr, flush=True)

    model, tokenizer = load(options.model)
    found = transfer(model, tokenizer, items=options.items, strength=options.strength, keep=options.keep, progress=say)
    if options.json is not None:
        about = {"items": options.items, "strength": options.strength, "keep": options.keep}
        options.json.write_text(json.dumps({**about, "right": found}, indent=1) + "\n", encoding="utf-8")
    print(transfer_table(found, options.items))


if __name__ == "__main__":
    main()
