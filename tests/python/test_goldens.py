"""The published code itself, run on SmolLM2, against a patched SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attnrb
import numpy as np
import pytest
import torch

# The published code divides by 31 whatever the model.
PUBLISHED_DEPTH = 31


@pytest.fixture(scope="module")
def smollm2(smollm2_folder: Path) -> Any:
    pytest.importorskip("gguf", reason="reading the model's file needs the package gguf")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def goldens(shared: Path) -> Any:
    file = shared / "goldens" / "smollm2_reference.npz"
    if not file.is_file():
        pytest.skip(f"no {file.name} in the shared data")
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.shared
def test_patched_model_is_the_published_code(smollm2: Any, goldens: Any) -> None:
    """Last logits of the prompt within 2e-3, and 32 greedy tokens equal, for every case in the file."""
    cases = sorted(name.removesuffix("_alpha") for name in goldens if name.endswith("_alpha"))
    assert cases
    for case in cases:
        ids = torch.from_numpy(goldens[f"{case}_input_ids"])[None]
        config = attnrb.RebalanceConfig(alpha=float(goldens[f"{case}_alpha"]), depth=PUBLISHED_DEPTH)
        with torch.inference_mode(), attnrb.patch(smollm2, config):
            logits = smollm2(ids).logits[0, -1].numpy()
            # The published run went on past the token that ends a text.
            text = smollm2.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, eos_token_id=None
            )
        error = np.abs(logits - goldens[f"{case}_last_logits"]).max()
        assert error <= 2e-3, f"{case}: logits differ by {error:.1e}"
        assert text[0, ids.shape[1] :].tolist() == goldens[f"{case}_greedy"].tolist(), case


def test_patched_model_is_the_dense_oracles(smollm2: Any) -> None:
    """Without the shared data too: tokens drawn at random, the second row padded on the left."""
    from dense_oracle import DenseOracle, linear_gains

    ids = torch.randint(2, 49152, (2, 48), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    config = attnrb.RebalanceConfig(alpha=0.3)
    truth = DenseOracle(linear_gains(smollm2.config.num_hidden_layers, 0.3), threshold=config.threshold)
    with torch.inference_mode():
        with truth.attached(smollm2):
            expected = smollm2(ids, attention_mask=mask).logits
        with attnrb.patch(smollm2, config) as patched:
            logits = smollm2(ids, attention_mask=mask).logits
    error = (logits - expected).abs()[mask.bool()].max()
    assert error <= 2e-3, f"logits differ by {error:.1e}"
    assert patched.stats.rows == smollm2.config.num_attention_heads * int(mask.sum())
