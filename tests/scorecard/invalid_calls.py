"""Invalid calls of every native op: each must raise; none may crash, or give a result.

    python tests/scorecard/invalid_calls.py --count 5000 --seed 0

Each call is a valid one (`calls.call`) with one argument made invalid, in a way that its kind allows. Calls run in
child processes, so that a crash is counted and named too. A fault is a call that gave a result or crashed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
from typing import Any

import torch
from calls import OPS, Sizes, call, invoke
from row import Tally, run

_PART = 250  # calls of a child process
_SLOTS = ("first_query", "key_start", "key_end", "query_offsets")


def mutations(name: str, sizes: Sizes, arguments: dict[str, Any]) -> dict[str, Any]:
    """Invalid values by a description: what to put in place of which argument."""
    found: dict[str, tuple[str, Any]] = {}
    for argument, value in arguments.items():
        if isinstance(value, torch.Tensor):
            for kind, changed in _tensors(name, argument, value, sizes).items():
                found[f"{argument}: {kind}"] = (argument, changed)
            if argument in ("query", "key", "weights", "grad_output", "lse", "output"):
                found[f"{argument}: none"] = (argument, None)
        elif isinstance(value, bool):
            found[f"{argument}: text"] = (argument, "yes")
        elif isinstance(value, (int, float)):
            for number in _numbers(argument):
                found[f"{argument}: {number!r}"] = (argument, number)
    return found


def _tensors(name: str, argument: str, value: torch.Tensor, sizes: Sizes) -> dict[str, Any]:
    """Invalid tensors in place of a valid one."""
    wrong = {
        "text": "a tensor",
        "one more axis": value[None],
        "another device": value.to("meta"),
        "complex": value.to(torch.complex64),
        "sparse": value.to_sparse() if value.numel() else "empty",
    }
    if argument == "mask" or argument == "key_bias":
        wrong.pop("one more axis")
    if value.dim() > 1:
        wrong["one axis less"] = value[0]
        if argument == "mask":
            wrong.pop("one axis less")
    if argument in _SLOTS:
        wrong |= {"float": value.float(), "longer": torch.cat([value, value, value[:1]])}
    elif argument in ("indices", "counts"):
        wrong |= {"int64": value.long(), "float": value.float(), "longer batch": torch.cat([value, value[:1]])}
    elif argument == "mask":
        wrong |= {"float": value.float(), "int8": value.to(torch.int8)}
        wrong["more keys"] = torch.ones(*value.shape[:-1], sizes.keys + 3, dtype=torch.bool)
    elif argument in ("gain", "sinks"):
        wrong["longer"] = torch.cat([value, value, value[:1]])
        wrong["int"] = value.long()
        if argument == "gain":
            wrong["float64"] = value.double()
            if name in ("attention", "rebalanced_attention"):
                wrong["nan"] = torch.full_like(value, math.nan)
    elif argument == "key_bias":
        wrong |= {"int": value.long(), "more heads": value.repeat(1, 3, 1)[:, : sizes.heads + 2]}
        if sizes.batch > 1:
            wrong["longer batch"] = torch.cat([value, value[:1]])
    else:
        wrong |= {"int": value.long(), "bool": value.bool(), "longer batch": torch.cat([value, value[:1]])}
        if argument not in ("lse", "grad_lse", "grad_received"):
            wrong["float64"] = value.double()
            if not (argument in ("weights", "query") and name in ("outlier_mask", "rebalance", "rebalance.per_head")):
                wrong["wider"] = torch.cat([value, value[..., :1]], -1)
            if argument == "value":
                wrong.pop("wider", None)
                wrong["more keys"] = torch.cat([value, value[:, :, :1]], 2)
        else:
            wrong["float16"] = value.half()
    if name == "outlier_mask":  # which has nothing else to fit
        wrong.pop("longer batch", None)
        wrong.pop("another device", None)
    if name in ("rebalance", "rebalance.per_head") and argument == "weights" and sizes.batch == 1:
        wrong.pop("longer batch", None)
    return wrong


def _numbers(argument: str) -> list[Any]:
    if argument in ("threshold", "emit"):
        return [0.0, 1.0, -0.5, 2.0, math.nan, math.inf, "0.1"]
    if argument == "rule":
        return [-1, 3, 99, "row"]
    if argument in ("window", "chunk"):
        return [-1, -(2**62), "2"]
    if argument == "softcap":
        return [-1.0, math.nan, "5"]
    if argument == "scale":
        return [math.nan, math.inf, "1"]
    if argument in ("query_offset", "key_offset"):
        return [2**62, 2**31, -(2**62), "0", 0.5]
    if argument == "gain":
        return [math.nan, math.inf, "0.5"]
    return []


def draw(seed: int) -> tuple[str, str, dict[str, Any]]:
    """The op, what is wrong, and the arguments of one invalid call."""
    rng = random.Random(seed)
    name = rng.choice(OPS)
    sizes, arguments = call(name, rng)
    wrong = mutations(name, sizes, arguments)
    what = rng.choice(sorted(wrong))
    argument, value = wrong[what]
    return name, what, {**arguments, argument: value}


def make_calls(first: int, count: int) -> None:
    """Make the calls of some seeds, each announced before, so that a crash has a name."""
    torch.set_num_threads(1)
    for seed in range(first, first + count):
        name, what, arguments = draw(seed)
        print(json.dumps([seed, name, what]), flush=True)
        try:
            invoke(name, arguments)
        except Exception as error:
            print(json.dumps(type(error).__name__), flush=True)
        else:
            print("null", flush=True)


def work(tally: Tally) -> None:
    """Run everything in child processes and count."""
    first = tally.seed * 10_000_000
    end = first + tally.count
    while first < end and not tally.over():
        count = min(_PART, end - first)
        command = [sys.executable, __file__, "--child", str(count), "--seed", str(first)]
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        for told, came in zip(lines[::2], lines[1::2], strict=False):
            tally.counts["calls"] += 1
            if came == "null":
                tally.fault(f"gave a result: {told}")
            else:
                tally.counts[f"raised {json.loads(came)}"] += 1
        done = len(lines) // 2
        if done < count:
            tally.counts["calls"] += 1
            tally.fault(f"crashed: {lines[-1] if len(lines) % 2 else first + done}")
            done += 1
        first += done


if __name__ == "__main__":
    if "--child" in sys.argv:
        child = argparse.ArgumentParser()
        child.add_argument("--child", type=int)
        child.add_argument("--seed", type=int)
        chosen = child.parse_args()
        make_calls(chosen.seed, chosen.child)
    else:
        sys.exit(run("invalid", __doc__, work, count=5000))
