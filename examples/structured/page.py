"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnrb import __version__
from attnrb.evaluation.page import COLOURS, plot, table, whole_page
from attnrb.models import DEFAULT_MODEL_NAME
from attnrb.reports.html_page import escape

from structured.settings import LEARNING_RATES

_ARMS = {"plain": "plain", "rebalanced": "re-balanced", "gains": "learnt gains"}
_COLOUR = {"plain": COLOURS[0], "rebalanced": COLOURS[1], "gains": COLOURS[2]}
_DASHES = ("solid", "dash", "dot", "dashdot")
_SMOOTHED = 10  # steps whose losses are averaged for the eye
_HEIGHT = 320


def page(report: Mapping[str, Any]) -> str:
    """The page of what `structured.report.collect` gives."""
    study = report["study"]
    what = {"lora": "LoRA", "full": "Full fine-tuning", "gains": "Training the gains"}[study["train"]]
    title = f"{what} of {study['model'] or DEFAULT_MODEL_NAME} on {study['data']}"
    lead = "The same data in the same order for every arm; seeds differ in order and in the adapters' start."
    parts = [_findings(report), _losses(report), _gains(report), _attention(report), _limits(report), _settings(study)]
    return whole_page(title, escape(lead), parts, __version__)


def sentences(report: Mapping[str, Any]) -> list[str]:
    """What was found, in words."""
    lines = []
    for each in report["differences"]:
        seeds = f"{each['seeds']} seeds, {_signed(each['min'])} to {_signed(each['max'])}"
        spread = "one seed" if each["seeds"] == 1 else seeds
        lines.append(
            f"Held-out loss, {_ARMS[each['what']]} after training against {each['against']}: "
            f"{_signed(each['mean'])} nats a token "
            f"({spread})"
        )
    for run in report["runs"]:
        if run["attention"] is not None:
            before, after = run["attention"]["before"]["mean"], run["attention"]["after"]["mean"]
            changes = ", ".join(
                f"{_short(name)} {_value(name, before[name])} to {_value(name, after[name])}" for name in before
            )
            lines.append(f"Attention, {_name(run)}, mean of all layers: {changes}")
    return lines


def _findings(report: Mapping[str, Any]) -> str:
    items = "".join(f"<li>{escape(line)}.</li>" for line in sentences(report)) or "<li>Nothing is finished yet.</li>"
    return f"<section><h2>What was found</h2><ul>{items}</ul></section>"


def _losses(report: Mapping[str, Any]) -> str:
    before = report["before"]["held_out"]
    precision = report["study"]["precision"]
    training, held_out = [], []
    for run, style in _styled(report):
        steps = [step for step, _ in run["training"]]
        smooth = list(_running_mean([loss for _, loss in run["training"]]))
        training.append({"x": steps, "y": smooth, "name": _name(run), "mode": "lines", "line": style})
        start = before["plain" if run["arm"] == "plain" else "rebalanced"][precision]
        curve = [(0, start), *run["held_out_curve"]]
        if curve[-1][0] < steps[-1]:
            curve.append((steps[-1], run["held_out"][precision]))
        x, y = ([point[axis] for point in curve] for axis in (0, 1))
        held_out.append({"x": x, "y": y, "name": _name(run), "mode": "lines+markers", "line": style})
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "loss, nats a token"}}}
    measured = {
        "before, plain": before["plain"],
        "before, re-balanced with fixed gains": before["rebalanced"],
        **{f"after, {_name(run)}": run["held_out"] for run in report["runs"]},
    }
    rows = [[name, *(f"{loss:.4f}" for loss in losses.values())] for name, losses in measured.items()]
    computed = [f"in {name}" for name in before["plain"]]
    return f"""<section><h2>Loss</h2>
<h3>Training</h3><p class="soft small">Mean of the last {_SMOOTHED} steps; products in {escape(precision)}.</p>
{plot("training", "Training loss by step", training, layout, _HEIGHT)}
<h3>Held out</h3><p class="soft small">Records that no run was trained on, measured as training computes.</p>
{plot("held-out", "Held-out loss by step", held_out, layout, _HEIGHT)}
<p class="soft small">After training, adapters merged into the weights, as the model will be used:</p>
{table(["held-out loss", *computed], rows, 1)}</section>"""


def _gains(report: Mapping[str, Any]) -> str:
    fixed = report["fixed_gains"]
    learnt = [run for run in report["runs"] if run["gains"] is not None]
    if fixed is None or not learnt:
        return ""
    parts = []
    for place, run in enumerate(learnt):
        moved = [
            [after - before for after, before in zip(row, start, strict=True)]
            for row, start in zip(run["gains"], fixed, strict=True)
        ]
        limit = max(max(abs(value) for row in moved for value in row), 1e-9)
        heat = {
            "type": "heatmap",
            "z": moved,
            "zmin": -limit,
            "zmax": limit,
            "colorscale": "change",
            "hovertemplate": "layer %{y}, head %{x}: %{z:+.4f}<extra></extra>",
        }
        layout = {
            "xaxis": {"title": {"text": "head"}, "dtick": 1},
            "yaxis": {"title": {"text": "layer"}},
        }
        parts.append(
            f"<h3>{escape(_name(run))}: learnt less fixed gain, layer by head</h3>"
            + plot(f"moved-{place}", "How far each gain moved", [heat], layout, 18 * len(moved) + 80)
        )
    lines = [_line("fixed", [sum(row) / len(row) for row in fixed], {"color": COLOURS[1], "dash": "dash"})]
    lines += [
        _line(_name(run), [sum(row) / len(row) for row in run["gains"]], style)
        for run, style in _styled(report)
        if run["gains"] is not None
    ]
    layout = {"xaxis": {"title": {"text": "layer"}}, "yaxis": {"title": {"text": "gain, mean of heads"}}}
    return f"""<section><h2>How the gains moved</h2>{"".join(parts)}<h3>Mean of each layer</h3>
{plot("gains", "Mean gain by layer", lines, layout, _HEIGHT)}</section>"""


def _attention(report: Mapping[str, Any]) -> str:
    runs = [run for run in report["runs"] if run["attention"] is not None]
    start = report["before"]["attention"]
    if start is None or not runs:
        return ""
    parts = []
    for name, what in report["measures"].items():
        lines = [
            _line("before, plain", start["plain"]["layers"][name], {"color": "#888888"}, report["layers"]),
            _line(
                "before, re-balanced",
                start["rebalanced"]["layers"][name],
                {"color": "#888888", "dash": "dash"},
                report["layers"],
            ),
        ]
        lines += [
            _line(f"after, {_name(run)}", run["attention"]["after"]["layers"][name], style, report["layers"])
            for run, style in _styled(report)
            if run["attention"] is not None
        ]
        layout = {"xaxis": {"title": {"text": "layer"}}}
        head = ["layer", *(f"{_name(run)}, {when}" for run in runs for when in ("before", "after"))]
        rows = [
            [str(layer)]
            + [
                _value(name, run["attention"][when]["layers"][name][place])
                for run in runs
                for when in ("before", "after")
            ]
            for place, layer in enumerate(report["layers"])
        ]
        label = what[:1].upper() + what[1:]
        parts.append(
            f"<h3>{escape(label)}</h3>{plot(name, what + ' by layer', lines, layout, _HEIGHT)}"
            f"<details><summary>Every layer</summary>{table(head, rows, 0)}</details>"
        )
    return f"""<section><h2>Attention, layer by layer</h2><p class="soft small">On held-out records; means over the
heads of a layer. Before: the untrained model, in the same setting as after, that is plain or re-balanced.</p>
{"".join(parts)}</section>"""


def _limits(report: Mapping[str, Any]) -> str:
    seeds = {run["seed"] for run in report["runs"]}
    count = "one seed tells nothing of chance" if len(seeds) < 2 else f"{len(seeds)} seeds tell little of chance"
    return f"""<section><h2>What this does not show</h2><ul>
<li>Whether a difference would last: {count}, and a longer training, another rate or more data may turn it round.</li>
<li>Whether answers become better: the loss is that of the next token, on records like those trained on.</li>
<li>A cause: attention and loss change together here, and neither is shown to bring about the other.</li>
</ul></section>"""


def _settings(study: Mapping[str, Any]) -> str:
    used = {
        "model": DEFAULT_MODEL_NAME,
        "learning_rate": LEARNING_RATES[study["train"]],
        "steps": "as many as the epochs take",
        "epochs": 1.0 if study["steps"] is None else "as many as the steps take",
        "limit": "none",
    }
    rows = []
    for name, value in study.items():
        value = used.get(name, value) if value is None else value
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        for key, each in inner:
            rows.append([name if key is None else f"{name}.{key}", "default" if each is None else str(each)])
    return f"<section><h2>Settings</h2>{table(['option', 'value'], rows, 2)}</section>"


# -------------------------------------------------------------------------------------------------------- small parts


def _styled(report: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], dict[str, str]]]:
    """Every run with its line: a colour for the arm, dashes for the seed."""
    seeds = sorted({run["seed"] for run in report["runs"]})
    for run in report["runs"]:
        yield run, {"color": _COLOUR[run["arm"]], "dash": _DASHES[seeds.index(run["seed"]) % len(_DASHES)]}


def _line(
    name: str, y: Sequence[float | None], style: Mapping[str, str], x: Sequence[int] | None = None
) -> dict[str, Any]:
    return {"x": list(x or range(len(y))), "y": list(y), "name": name, "mode": "lines", "line": dict(style)}


def _name(run: Mapping[str, Any]) -> str:
    return f"{_ARMS[run['arm']]}, seed {run['seed']}"


def _running_mean(values: Sequence[float]) -> Iterator[float]:
    for place in range(len(values)):
        window = values[max(0, place + 1 - _SMOOTHED) : place + 1]
        yield sum(window) / len(window)


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _short(name: str) -> str:
    return {"non_semantic": "non-semantic", "first_key": "first key", "outlier_overlap": "overlap"}.get(name, name)


def _value(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if name in ("non_semantic", "first_key") else f"{value:.3f}"
