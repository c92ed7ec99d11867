"""Memory of a patched model on long batches: linear in the text, whatever the mask says in numbers."""

from __future__ import annotations

import pytest
from process_memory import growth

pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

LENGTH = 16384

WORKER = """
import attnrb, torch
from tiny_models import ARCHITECTURES, tiny, tokens

name, length = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(2)
layers = {} if "layer_types" in ARCHITECTURES[name] else {"num_hidden_layers": 3}
model = tiny(name, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=length, **layers).base_model
ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.int64)
mask[1, : length // 4] = 0
with torch.no_grad(), attnrb.patch(model, attnrb.RebalanceConfig(alpha=0.5)) as patched:
    for inputs in ({}, {"attention_mask": mask}):
        model(ids[:, -64:], **{key: each[:, -64:] for key, each in inputs.items()}, use_cache=False)
    before = peak()
    for inputs in ({}, {"attention_mask": mask}):
        model(ids, **inputs, use_cache=False)
    assert patched.stats.forwards == 4 and patched.stats.outliers > 0
print(peak() - before)
"""


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt_neox"])
def test_no_matrix_of_all_queries_and_keys(name: str) -> None:
    """Causal, padded and windowed: not even one byte for each pair, in one row of the batch, is ever there."""
    assert growth(WORKER, name, LENGTH) < LENGTH * LENGTH / 2
