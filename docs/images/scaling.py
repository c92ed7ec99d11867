"""Draws scaling.svg from what `bench/python/bench_scaling.py --json FILE` stored: time against sequence length.

python docs/images/scaling.py FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib import pyplot

LINES = (
    ("sdpa", "PyTorch, re-balancing off", "o-", "#888888"),
    ("sdpa at best", "PyTorch, heads as query rows", "o:", "#888888"),
    ("attnrb", "attnrb, re-balancing on", "o-", "#d1495b"),
)
LIMIT = ("torch.mm, or a plain read", "#00798c")


def main() -> None:
    stored = json.loads(Path(sys.argv[1]).read_text())
    matplotlib.rcParams.update({"svg.hashsalt": "attnrb", "svg.fonttype": "none", "font.size": 9})
    kinds = list(dict.fromkeys(case["kind"] for case in stored["cases"]))
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(10, 3.7), layout="constrained")
    for panel, kind in zip(panels, kinds, strict=True):
        cases = [case for case in stored["cases"] if case["kind"] == kind]
        lengths = [case["keys"] for case in cases]
        for name, label, style, colour in LINES:
            if name not in cases[0]["seconds"]:
                continue
            times = [case["seconds"][name]["median"] * 1e3 for case in cases]
            panel.loglog(lengths, times, style, color=colour, label=label, markersize=4)
        limit, colour = LIMIT
        panel.loglog(lengths, [case["limit_seconds"] * 1e3 for case in cases], "--", color=colour, label=limit)
        panel.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        panel.minorticks_off()
        panel.set(title=kind, xlabel="keys")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("milliseconds")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    processor, threads = stored["machine"]["processor"], stored["threads"]
    figure.suptitle(f"H 32/8, D 128, batch 1, {threads} threads of {processor}", fontsize=9)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
