"""``attnrb demo``: both uses on one model, re-balancing of a text and emphasis in a small task."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from attnrb.cli import files, render
from attnrb.cli.console import output, steps, user_errors
from attnrb.cli.loading import Loading, load_model, run_facts, takes_model

_STRENGTH = 16.0


@takes_model
def demo(
    *,
    items: Annotated[int, typer.Option("--items", min=1, help="How many prompts of two facts.")] = 24,
    heads: Annotated[
        str | None,
        typer.Option("--heads", help="A profile's file or name.", show_default="made here, from other prompts"),
    ] = None,
    loading: Loading,
    json: files.JsonFile = None,
) -> None:
    """Show both uses: a text without and with re-balancing, then which of two facts a model goes by with emphasis."""
    with user_errors(), steps() as step:
        from attnrb.policies import HeadProfile
        from attnrb.studies.compare import compare
        from attnrb.studies.conflict import conflict_items

        files.check_outputs(json=json)
        chosen = None if heads is None else HeadProfile.load(heads)
        loaded, tokenizer = load_model(loading, step)
        comparison = compare(loaded, tokenizer, progress=step)
        start = time.perf_counter()
        profile, found = _arms(loaded, tokenizer, items, chosen, step)
        seconds = time.perf_counter() - start
    about = run_facts(loaded, loading, temperature=0.0, seed=0)

    def facts() -> dict[str, Any]:
        counted = {"items": items, "strength": _STRENGTH, "right": found, "seconds": seconds, "heads": profile}
        return {**about, "comparison": comparison.to_dict(), **counted}

    def show() -> None:
        from attnrb.cli.heat import conflict_table

        render.comparison(output(), comparison, tokenizer, about)
        output().print()
        output().print(conflict_table(conflict_items(1)[0], items, found, seconds))

    files.print_or_write_json(json, facts, show)


def _arms(
    model: Any, tokenizer: Any, count: int, profile: Any, step: Callable[[str], None]
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """The heads of the profile, and how many items are right in each arm, by what the arm does."""
    from attnrb.policies import Emphasis
    from attnrb.studies.conflict import conflict_examples, conflict_items, score_items
    from attnrb.studies.profile import profile_heads

    if profile is None:
        profile = profile_heads(model, tokenizer, None, conflict_examples(tokenizer), progress=step)
    everywhere, kept = Emphasis(strength=_STRENGTH), Emphasis(strength=_STRENGTH, heads=profile)
    arms: dict[str, tuple[Any, str]] = {
        "as it is": (None, "none"),
        "asterisks around the newer fact": (None, "asterisks"),
        "emphasis on the newer fact, all heads": (everywhere, "span"),
        f"emphasis on the newer fact, {profile.keep} chosen heads": (kept, "span"),
        "emphasis on the older fact, all heads": (everywhere, "older"),
    }
    items = conflict_items(count)
    found = {}
    for name, (policy, markup) in arms.items():
        step(f"Asking {count} times: {name}")
        found[name] = score_items(model, tokenizer, items, policy, markup).right
    return {str(layer): list(heads) for layer, heads in profile.chosen.items()}, found
