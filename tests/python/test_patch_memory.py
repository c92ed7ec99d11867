"""Memory of a patched model on long batches: linear in the text, whatever the mask says in numbers."""

from __future__ import annotations

import pytest
from process_memory import printed

pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

LENGTH = 16384

NAMES = ["llama", "mistral", "gemma3_text", "gpt_neox"]

# Growth of the peak of a process for each model, since a peak never falls. They are forked, so that all of them import
# once; nothing has started a thread by then.
WORKER = """
import os, traceback
import attnrb, torch
from tiny_models import ARCHITECTURES, tiny, tokens

def growth(name, length):
    torch.set_num_threads(2)
    layers = {} if "layer_types" in ARCHITECTURES[name] else {"num_hidden_layers": 3}
    options = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=length, **layers)
    model = tiny(name, **options).base_model
    ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.int64)
    mask[1, : length // 4] = 0
    with torch.no_grad(), attnrb.patch(model, attnrb.RebalanceConfig(alpha=0.5)) as patched:
        for inputs in ({}, {"attention_mask": mask}):
            model(ids[:, -64:], **{key: each[:, -64:] for key, each in inputs.items()}, use_cache=False)
        before = peak()
        for inputs in ({}, {"attention_mask": mask}):
            model(ids, **inputs, use_cache=False)
        assert patched.stats.forwards == 4 and patched.stats.outliers > 0
    return peak() - before

for name in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        try:
            print(name, growth(name, int(sys.argv[1])), flush=True)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.fixture(scope="module")
def growths() -> dict[str, int]:
    """Bytes by which the peak of each model grew."""
    lines = printed(WORKER, LENGTH, *NAMES).splitlines()
    return {name: int(grew) for name, grew in map(str.split, lines)}


@pytest.mark.parametrize("name", NAMES)
def test_no_matrix_of_all_queries_and_keys(name: str, growths: dict[str, int]) -> None:
    """Causal, padded and windowed: not even one byte for each pair, in one row of the batch, is ever there."""
    assert 0 < growths[name] < LENGTH * LENGTH / 2
