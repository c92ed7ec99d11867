"""Attention over every option, drawn at random, against float64.

    python tests/scorecard/fuzz.py --count 20000                  # outputs, log-sum-exps and outliers
    python tests/scorecard/fuzz.py --gradients 1 --count 1000     # and all gradients

The draws are those of ``tests/python/edited_problems.py``: rules, key bias, first query, emission, windows, chunks,
softcap, sinks, groups of heads, other widths of values, padding, masks, dtypes, layouts, decoding. Nothing may be off
by more than ``2 e(PyTorch) + u``: Note: [Earned tolerance of edits]. A draw that exceeds it is tried again with
PyTorch's errors taken over more draws of the same shapes, since the largest of a few rows is a matter of luck; it is
counted.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from row import ROOT, Tally, run

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(ROOT / "tests" / "python"))

import numpy as np
import torch
from attnrb import reference
from edited_problems import Dense, EditedProblem, random_problem
from test_attention_accuracy import check, check_outliers, earned, lse_magnitude
from test_attention_accuracy import run as call
from tolerance import error, one_rounding

_DRAWS = 3  # over which the suite takes PyTorch's errors; one will do where its error is enough
_MORE = 24  # and where these were not enough
_FIRST = 1_000_000  # past the seeds of the suite


def forward(tally: Tally, seed: int) -> None:
    """One configuration, forward only."""
    problem = random_problem(seed)
    expected = reference.attention(
        problem.query, problem.key, problem.value, edit=problem.edit(), emit=problem.emit, **problem.options
    )
    with torch.no_grad():
        output, lse, outliers = call(problem, _sinks(problem))
    assert torch.isfinite(output).all(), "not finite"
    seeing = problem.seen.any(-1)
    assert (lse[~seeing] == -torch.inf).all(), "a row that sees nothing has a log-sum-exp"
    if problem.emit is not None:
        check_outliers(problem, outliers)
    with torch.no_grad():
        dense = problem.eager(problem.leaves(torch.float64))
    sizes = _Sizes(problem, dense)
    off = sizes.errors(output, lse, *expected[:2])
    own: dict[str, float] = {}
    for repeat in range(_MORE):
        if repeat:
            problem = random_problem(seed, repeat)
            with torch.no_grad():
                dense = problem.eager(problem.leaves(torch.float64))
            sizes = _Sizes(problem, dense)
        _widen(own, _own(problem, dense, sizes))
        ratios = {name: off[name] / (2 * own[name] + _rounding(name, output)) for name in off}
        assert np.isfinite(list(own.values())).all(), "PyTorch overflowed: this configuration earns no tolerance"
        if max(ratios.values()) <= 1:
            break
        if repeat == _DRAWS - 1:
            tally.counts["configurations that needed more draws of PyTorch's error"] += 1
    for name, ratio in ratios.items():
        tally.see(f"largest error of the {name}, of what is allowed", ratio)
        assert ratio <= 1, f"{name}: error {off[name]:.3g}, PyTorch's own {own[name]:.3g} over {repeat + 1} draws"


def _sinks(problem: EditedProblem) -> dict[str, Any]:
    return {name: leaf.detach() for name, leaf in problem.leaves(problem.query.dtype).items()} | {
        name: getattr(problem, name) for name in ("query", "key", "value")
    }


def _rounding(name: str, output: torch.Tensor) -> float:
    return one_rounding(torch.float32 if name == "log-sum-exp" else output.dtype)


class _Sizes:
    """What the errors of one problem are measured by."""

    def __init__(self, problem: EditedProblem, dense: Dense) -> None:
        self._seeing = problem.seen.any(-1).numpy()
        self._output = problem.magnitudes(dense)["output"].numpy()
        self._lse = lse_magnitude(problem, dense, dense.lse.numpy())[self._seeing]

    def errors(self, output: Any, lse: Any, expected_output: Any, expected_lse: Any) -> dict[str, float]:
        """Of an output and its log-sum-exp."""
        seeing = self._seeing
        return {
            "output": error(output, np.asarray(expected_output), self._output),
            "log-sum-exp": error(lse[torch.from_numpy(seeing)], np.asarray(expected_lse)[seeing], self._lse),
        }


def _own(problem: EditedProblem, dense: Dense, sizes: _Sizes) -> dict[str, float]:
    """PyTorch's own errors."""
    with torch.no_grad():
        low = problem.eager(problem.leaves(problem.query.dtype))
    return sizes.errors(low.output, low.lse, dense.output.numpy(), dense.lse.numpy())


def _widen(worst: dict[str, float], more: dict[str, float]) -> None:
    for name, value in more.items():
        worst[name] = max(worst.get(name, 0.0), value)


def gradients(tally: Tally, seed: int) -> None:
    """One configuration, forward and backward."""
    for repeats in (1, _DRAWS, _MORE):
        if repeats == _MORE:
            tally.counts["configurations that needed more draws of PyTorch's error"] += 1
        try:
            check(random_problem(seed), earned(seed, repeats))
            return
        except AssertionError as first:
            if "allowed" not in str(first) or repeats == _MORE:
                raise


def work(tally: Tally) -> None:
    """Try every seed."""
    torch.set_num_threads(1)
    attempt = gradients if tally.options.gradients else forward
    for seed in tally.seeds():
        tally.counts["configurations"] += 1
        try:
            attempt(tally, _FIRST + seed)
        except Exception as error:
            tally.fault(f"seed {_FIRST + seed}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    wanted = "gradients" if any(each.startswith("--gradients") for each in sys.argv) else "forward"
    sys.exit(run(wanted, __doc__, work, count=20_000 if wanted == "forward" else 1000, gradients=0))
