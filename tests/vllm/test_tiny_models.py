"""Tiny random models of several families: vLLM says what transformers with `attnrb.patch` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines
import pytest

# A log-probability is a sum over logits of size 10 or so; two engines add in different orders.
MOST = 1e-4

POLICIES: dict[str, dict[str, Any]] = {
    "rebalance": {"policy": "rebalance", "alpha": 1.5},
    "chosen": {"policy": "rebalance", "alpha": 1.5, "normalize": True, "source_layer": 1, "heads": [0, 2]},
    "emphasis": {"policy": "emphasis", "strength": 8},
    "heads": {"policy": "emphasis", "strength": 3, "rows": "all", "heads": {1: [0, 1], 2: [3]}},
    "share": {"policy": "emphasis", "share": 0.3},
    "last": {"policy": "emphasis", "strength": 4, "rows": "last", "outside": 0.5},
}
MARKED = ("emphasis", "heads", "share", "last")


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "qwen3", "gpt_oss"])
def test_a_tiny_model(kind: str, tmp_path: Path) -> None:
    model, prompts = engines.tiny_model(kind, tmp_path), engines.tiny_prompts()
    spans = engines.spans_of(prompts)
    wanted = {
        name: engines.reference(model, policy, prompts, spans if name in MARKED else None)
        for name, policy in POLICIES.items()
    }
    plain = engines.reference(model, None, prompts)
    with engines.engine(tmp_path, "off") as llm:
        for _ in range(2):  # the second time the prompts' keys are cached
            for name, policy in POLICIES.items():
                options = [{**policy, "spans": own} if name in MARKED else policy for own in spans]
                found = engines.asked(llm, prompts, options)
                assert engines.differences(found, wanted[name]) <= (0, MOST), name
                # It must not be equal because nothing was edited.
                assert engines.differences(found, plain) > (0, 10 * MOST), name
            assert engines.differences(engines.asked(llm, prompts), plain) <= (0, MOST)
