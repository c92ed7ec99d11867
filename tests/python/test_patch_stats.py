"""What a patch says it did, against what the dense oracle counts."""

from __future__ import annotations

import json
import threading

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from dense_oracle import DenseOracle
from tiny_models import LAYERS, tiny, tokens

pytestmark = pytest.mark.oldest

CONFIG = attnrb.RebalanceConfig(threshold=0.05)


def test_counts_are_the_oracles() -> None:
    model = tiny("llama")
    batches = [tokens(2, 20), tokens(1, 7), tokens(3, 1)]
    truth = DenseOracle([0.0] * LAYERS, threshold=0.05)
    with torch.no_grad():
        with truth.attached(model):
            for ids in batches:
                model(ids)
        with attnrb.patch(model, CONFIG) as patched:
            assert patched.stats.to_dict() == {
                "forwards": 0,
                "rebalanced_layers": [],
                "rows": 0,
                "outliers": 0,
                "outliers_per_row": 0.0,
                "max_outliers_per_row": 0,
                "general_masks": 0,
            }
            for number, ids in enumerate(batches, start=1):
                model(ids)
                counts = torch.cat([each.flatten() for each in truth.counts[:number]])
                assert patched.stats.forwards == number
                assert patched.stats.rows == counts.numel()
                assert patched.stats.outliers == counts.sum()
                assert patched.stats.outliers_per_row == pytest.approx(counts.double().mean().item())
                assert patched.stats.max_outliers_per_row == counts.max()
    assert patched.stats.rebalanced_layers == (1, 2, 3), "the last layer's gain is 0"
    assert patched.stats.layers == 3
    assert json.loads(json.dumps(patched.stats.to_dict())) == patched.stats.to_dict()
    assert "rows=" in repr(patched)


@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_does_not_count(side: str) -> None:
    model, ids = tiny("llama"), tokens(2, 16)
    mask = torch.ones_like(ids)
    mask[1, {"left": slice(0, 10), "right": slice(6, 16), "inside": slice(3, 13)}[side]] = 0
    with torch.no_grad(), attnrb.patch(model, CONFIG) as patched:
        model(ids, attention_mask=mask)
    assert patched.stats.rows == 4 * (16 + 6)


def test_many_forwards_add_up() -> None:
    """More than wait to be added up together."""
    model, ids = tiny("gpt2"), tokens(1, 3)
    with torch.no_grad(), attnrb.patch(model, CONFIG) as patched:
        model(ids)
        once = patched.stats.outliers
        for _ in range(299):
            model(ids)
    assert (patched.stats.forwards, patched.stats.rows) == (300, 300 * 4 * 3)
    assert patched.stats.outliers == 300 * once


def test_a_forward_that_fails_is_not_counted() -> None:
    model = tiny("llama")
    with torch.no_grad(), attnrb.patch(model, CONFIG) as patched:
        with pytest.raises(NotImplementedError):
            model(tokens(1, 4), position_bias=torch.zeros(1))
        assert patched.stats.forwards == 0
        assert patched.stats.rows == 0


def test_threads_lose_no_count() -> None:
    model, ids = tiny("gpt2"), tokens(1, 3)
    with torch.no_grad(), attnrb.patch(model, CONFIG) as patched:

        def work() -> None:
            with torch.no_grad():
                for _ in range(50):
                    model(ids)
                    patched.stats.rows  # noqa: B018 (adds up)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (patched.stats.forwards, patched.stats.rows) == (150, 150 * 4 * 3)


def test_boosting_all_looks_for_no_outliers() -> None:
    model = tiny("llama")
    with torch.no_grad(), attnrb.patch(model, attnrb.RebalanceConfig(boost_all=True)) as patched:
        model(tokens(1, 4))
    assert (patched.stats.forwards, patched.stats.rows, patched.stats.layers) == (1, 0, 3)
