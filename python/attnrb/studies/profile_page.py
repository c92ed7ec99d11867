"""A ranking of heads as one HTML page that needs nothing else."""

from __future__ import annotations

import json
from typing import Any

from attnrb import __version__
from attnrb.policies.profile import HeadProfile
from attnrb.reports.html_page import THEME_BUTTON, document, escape

__all__ = ["profile_page"]


def profile_page(profile: HeadProfile) -> str:
    """The page: a heat map of all heads, those that are kept with their scores, and what made the profile.

    Whatever the profile says of itself is escaped. The page loads nothing.
    """
    title = "Which heads heed marked text"
    model = profile.about.get("model", "a model")
    body = f"""<header class="top"><div><h1>{title}</h1>
<p class="soft">{escape(model)}: {profile.layers} layers of {profile.heads} heads, {profile.keep} of them kept</p></div>
{THEME_BUTTON}</header>
<main>
<section><h2>All heads</h2>
<p class="small soft">A line is a layer, a column a head. A cell's shade is the head's score, by how much the loss of
the right answers falls for each unit of its log-gain, to first order: from 0 to {_best(profile):.3g} nats, on a root
scale. <span class="key" style="--a:0.8"></span> helps, <span class="key harms" style="--a:0.8"></span> harms,
★ is kept.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Heat map">{_heat(profile)}</div></section>
<section><h2>Kept heads</h2>
<details><summary>{profile.keep} heads, the best first</summary><div class="scroll">{_ranking(profile)}</div></details>
</section>
<section><h2>What made it</h2>{_about(profile)}</section>
</main>"""
    return document(f"{title}: {model}", body, package=__package__, extra=None, version=__version__)


def _best(profile: HeadProfile) -> float:
    return max(0.0, *(score for row in profile.scores for score in row))


def _heat(profile: HeadProfile) -> str:
    scale = max(abs(score) for row in profile.scores for score in row) or 1.0
    kept = profile.chosen
    head = "".join(f'<th scope="col">{each}</th>' for each in range(profile.heads))
    lines = []
    for layer, scores in enumerate(profile.scores):
        cells = []
        for place, score in enumerate(scores):
            star = place in kept.get(layer, ())
            kinds = " ".join(["harms"] * (score < 0) + ["kept"] * star)
            # The root spreads the many small scores out.
            shade = (abs(score) / scale) ** 0.5
            words = f"layer {layer}, head {place}: {score:+.4f}{', kept' if star else ''}"
            cells.append(
                f'<td class="{kinds}" style="--a:{shade:.3f}" title="{words}" aria-label="{words}">'
                f"{'★' if star else ''}</td>"
            )
        lines.append(f'<tr><th scope="row">{layer}</th>{"".join(cells)}</tr>')
    return f'<table class="heat"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _ranking(profile: HeadProfile) -> str:
    lines = [
        f'<tr><td class="number">{place}</td><td class="number">{layer}</td><td class="number">{head}</td>'
        f'<td class="number">{profile.scores[layer][head]:+.4f}</td></tr>'
        for place, (layer, head) in enumerate(profile.ranking[: profile.keep], 1)
    ]
    head = "".join(f'<th scope="col" class="number">{each}</th>' for each in ("place", "layer", "head", "score, nats"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _about(profile: HeadProfile) -> str:
    if not profile.about:
        return '<p class="soft">The profile does not say.</p>'
    lines = [f"<dt>{escape(name)}</dt><dd>{escape(_words(value))}</dd>" for name, value in profile.about.items()]
    return f"<dl>{''.join(lines)}</dl>"


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
