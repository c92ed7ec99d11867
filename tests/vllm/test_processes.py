"""Engines that run in processes of their own: two that share the heads of each layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import engines

MOST = 1e-4

_PROGRAM = """
import json, sys
import engines

def main():
    folder, jobs = sys.argv[1], json.load(open(sys.argv[2]))
    with engines.engine(folder, {"policy": "rebalance", "alpha": 1.5}, tensor_parallel_size=2) as llm:
        for _ in range(2):
            said = engines.asked(llm, jobs["prompts"], jobs["options"])
    json.dump([[each.tokens, each.logprobs] for each in said], open(sys.argv[3], "w"))

if __name__ == "__main__":
    main()
"""


def test_two_processes_share_the_heads(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    model, prompts = engines.tiny_model("llama", folder), engines.tiny_prompts()
    spans = engines.spans_of(prompts)
    policies = [
        {"policy": "rebalance", "alpha": 1.5},
        {"policy": "emphasis", "strength": 6, "heads": {"0": [1], "2": [0, 3]}},
        {"policy": "rebalance", "alpha": 1.0, "normalize": True, "heads": [3]},
    ]
    listed, options, wanted = [], [], []
    for policy in policies:
        marked = policy["policy"] == "emphasis"
        heads = policy.get("heads")
        own = {**policy, "heads": {int(k): v for k, v in heads.items()}} if isinstance(heads, dict) else policy
        wanted += engines.reference(model, own, prompts, spans if marked else None)
        listed += prompts
        options += [{**policy, "spans": each} if marked else policy for each in spans]
    jobs, out = tmp_path / "jobs.json", tmp_path / "out.json"
    jobs.write_text(json.dumps({"prompts": listed, "options": options}), "utf-8")
    here = Path(__file__).parent
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM, "utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": str(here),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    command = [sys.executable, str(program), str(folder), str(jobs), str(out)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = [engines.Answer(*each) for each in json.loads(out.read_text("utf-8"))]
    assert engines.differences(found, wanted) <= (0, MOST)
