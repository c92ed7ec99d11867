"""Engines as vLLM starts them by itself: the model is compiled, and attention stays one op in it."""

from __future__ import annotations

from pathlib import Path

import engines

MOST = 1e-4


def test_a_compiled_model(tmp_path: Path) -> None:
    model, prompts = engines.tiny_model("llama", tmp_path), engines.tiny_prompts()
    spans = engines.spans_of(prompts)
    rebalance, emphasis = {"policy": "rebalance", "alpha": 1.5}, {"policy": "emphasis", "strength": 8}
    wanted = [
        *engines.reference(model, rebalance, prompts),
        *engines.reference(model, emphasis, prompts, spans),
        *engines.reference(model, None, prompts),
    ]
    options = [rebalance] * len(prompts) + [{**emphasis, "spans": own} for own in spans] + ["off"] * len(prompts)
    with engines.engine(tmp_path, "off", enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
        for _ in range(2):  # the second time the prompts' keys are cached
            assert engines.differences(engines.asked(llm, prompts * 3, options), wanted) <= (0, MOST)
