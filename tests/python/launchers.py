"""How tests start several processes on this machine, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
NEUTRAL = ["--mixed_precision=no", "--dynamo_backend=no"]
# Named for GPUs, it is the launcher of several processes on one machine; who runs in them asks for the CPU.
ACCELERATE = [
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--main_process_port=0"),
    *NEUTRAL,
]


def launch(launcher: list[str], *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run what `arguments` name, a script or ``-m`` and a module, in the processes of a launcher."""
    # One left over from another run would hand its own ranks down.
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, arguments)],
        env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=400,
    )
