"""What a run spends its time on, kernel by kernel; on a CPU op by op."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a run."""

    name: str
    calls: float
    """In a run."""
    seconds: float
    """Of a run."""
    share: float
    """Of the run's kernels together."""


def by_kernel(run: Callable[[], Any], device: torch.device, runs: int = 5) -> list[KernelTime]:
    """The kernels of a run that has run before, those that take most first; times are means over ``runs``."""
    on_device = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]) as profiled:
        for _ in range(runs):
            run()
        if on_device:
            torch.cuda.synchronize()
    if on_device:
        taken = [
            (each.key, each.count, each.self_device_time_total)
            for each in profiled.key_averages()
            if each.device_type == DeviceType.CUDA
        ]
    else:
        taken = [(each.key, each.count, each.self_cpu_time_total) for each in profiled.key_averages()]
    total = sum(microseconds for _, _, microseconds in taken) or 1.0
    found = [
        KernelTime(short(name), count / runs, microseconds / runs / 1e6, microseconds / total)
        for name, count, microseconds in taken
        if microseconds > 0
    ]
    return sorted(found, key=lambda each: -each.seconds)


def short(name: str) -> str:
    """A kernel's name without its arguments and its namespaces."""
    return re.sub(r"(?:\w+::)+(?=\w)", "", re.sub(r"\(.*\)$", "", name.removeprefix("void ")))[:72]
