"""Shares of attention where a policy takes heads out: a head that attends to nothing has none."""

from __future__ import annotations

import attnrb
import pytest
import torch
from attnrb.policies import Custom, LayerView, Plain

pytest.importorskip("transformers")

from attnrb import Edit
from attnrb.studies.first_key import first_key_shares
from tiny_models import LAYERS, tiny, tokens


def taken_out(*heads: int) -> Custom:
    """All of these heads' entries weakened to nothing, in every layer."""

    def edit(view: LayerView) -> Edit:
        gain = torch.zeros(view.heads, dtype=torch.float32, device=view.device)
        gain[list(heads)] = -1.0
        return Edit(gain=gain)

    return Custom(edit, name="taken_out")


def test_heads_without_attention_do_not_count() -> None:
    model, ids = tiny("llama"), tokens(1, 20)
    plain = first_key_shares(model, ids, Plain())
    some = first_key_shares(model, ids, taken_out(1, 2))
    assert all(0.0 < share < 1.0 for share in (*plain, *some))
    with torch.no_grad(), attnrb.patch(model, Plain()):
        first_layer = model(ids, output_attentions=True).attentions[0]
    expected = float(first_layer[:, [0, 3], 1:, 0].mean())
    assert some[0] == pytest.approx(expected, rel=1e-5), "layer 0 reads what the plain model reads"


def test_no_head_left() -> None:
    model, ids = tiny("llama"), tokens(1, 20)
    assert first_key_shares(model, ids, taken_out(*range(4))) == (0.0,) * LAYERS
