"""Memory of emphasis on long texts: linear, in a model and in one layer, with biases that differ by head."""

from __future__ import annotations

import pytest
from process_memory import growth

pytest.importorskip("transformers")

LENGTH = 16384

WORKER = """
import attnrb, torch
from attnrb.policies.parse import parse_policy
from tiny_models import tiny, tokens

length = int(sys.argv[1])
torch.set_num_threads(2)
shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
model = tiny("llama", max_position_embeddings=length, **shape).base_model
ids, mask = tokens(1, length), torch.ones(1, length, dtype=torch.int64)
mask[0, : length // 4] = 0
spans = attnrb.Spans(((attnrb.Span(length // 3, length // 2), attnrb.Span(length - 80, length - 70, 3.0)),))
few = attnrb.Spans(((attnrb.Span(4, 9),),))
with torch.no_grad(), attnrb.patch(model, parse_policy(sys.argv[2])) as patched:
    with patched.spans(few):
        model(ids[:, -64:], attention_mask=mask[:, -64:], use_cache=False)
    before = peak()
    with patched.spans(spans):
        model(ids, attention_mask=mask, use_cache=False)
print(peak() - before)
"""


@pytest.mark.parametrize(
    "policy",
    ["emphasis(strength=16)", 'emphasis(heads={"0":[1]},rows=all,outside=0.1)', "emphasis(share=0.3)"],
)
@pytest.mark.slow
def test_no_matrix_of_all_queries_and_keys(policy: str) -> None:
    """With padding, and two spans: not even one byte for each pair, in one row of the batch, is ever there."""
    assert growth(WORKER, LENGTH, policy) < LENGTH * LENGTH / 2
