"""Emphasis on whole models: what its options mean, against stock attention with a mask and dense oracles."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from attnrb import Emphasis, HeadProfile, Span, Spans
from edit_oracle import Rewrite, Scores, attached, biased
from test_patch_models import assert_close
from tiny_models import LAYERS, tiny, tokens
from torch import Tensor

HEADS, LENGTH, PADDING = 4, 16, 4
STRENGTH = 8.0
SPANS = Spans(((Span(2, 5), Span(8, 9, 3.0)), (Span(6, 8),)))
ENDS = torch.tensor([9, 8])
# What SPANS come to with STRENGTH, and without strengths.
LOG_STRENGTHS, UNION = torch.zeros(2, 1, LENGTH), torch.zeros(2, 1, LENGTH, dtype=torch.bool)
LOG_STRENGTHS[0, 0, 2:5] = LOG_STRENGTHS[1, 0, 6:8] = math.log(STRENGTH)
LOG_STRENGTHS[0, 0, 8] = math.log(3.0)
UNION[0, 0, 2:5] = UNION[0, 0, 8] = UNION[1, 0, 6:8] = True

FIRST: dict[str, Tensor | None] = {"after": ENDS, "all": None, "last": torch.tensor([LENGTH - 1] * 2)}
MODELS = ("llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2", "stablelm")


def padding() -> Tensor:
    """int64 ``[2, LENGTH]``: the second row is padded on the left."""
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :PADDING] = 0
    return mask


def emphasised(model: Any, policy: attnrb.Policy, spans: Spans = SPANS, **options: Any) -> Tensor:
    """The logits of a padded batch's tokens, ``[tokens, vocabulary]``."""
    with torch.no_grad(), attnrb.patch(model, policy) as patched, patched.spans(spans):
        logits: Tensor = model(tokens(2, LENGTH), attention_mask=padding(), **options).logits
    return logits[padding().bool()]


def expected(model: Any, rewrite: Rewrite) -> Tensor:
    """The same by an oracle."""
    with torch.no_grad(), attached(model, rewrite):
        logits: Tensor = model(tokens(2, LENGTH), attention_mask=padding()).logits
    return logits[padding().bool()]


def plain(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens(2, LENGTH), attention_mask=padding()).logits
    return logits[padding().bool()]


def additive_mask(bias: Tensor, first: Tensor | None) -> Tensor:
    """float32 ``[2, 1, LENGTH, LENGTH]``: what a user would hand to stock attention: causality, padding and a bias."""
    slots = torch.arange(LENGTH)
    visible = (slots[None] <= slots[:, None]) & padding().bool()[:, None]
    rows = torch.ones(2, LENGTH, dtype=torch.bool) if first is None else slots >= first[:, None]
    table = torch.where(rows[:, :, None], bias, 0.0).expand(2, LENGTH, LENGTH)
    # Not -inf: a row of padding that sees nothing would be NaN in stock attention.
    return table.masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]


@pytest.mark.parametrize("rows", ["after", "all", "last"])
def test_equals_stock_attention_with_an_additive_mask(rows: str) -> None:
    model = tiny("llama")
    assert model.config._attn_implementation == "sdpa"
    got = emphasised(model, Emphasis(strength=STRENGTH, rows=rows))
    with torch.no_grad():
        truth = model(tokens(2, LENGTH), attention_mask=additive_mask(LOG_STRENGTHS, FIRST[rows])).logits
    assert_close(got, truth[padding().bool()])
    assert not torch.allclose(got, plain(model), atol=1e-2)


@pytest.mark.parametrize("rows", ["after", "all", "last"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_attention(name: str, rows: str) -> None:
    """Windows, softcaps, sinks, values of another width, no grouped heads, keyword arguments that a model drops."""
    model = tiny(name)
    got = emphasised(model, Emphasis(strength=STRENGTH, rows=rows))
    assert_close(got, expected(model, biased(LOG_STRENGTHS, FIRST[rows])))


def test_one_row_of_spans_serves_a_single_text() -> None:
    model, ids = tiny("llama"), tokens(1, 12)
    with torch.no_grad(), attnrb.patch(model, Emphasis(strength=4.0)) as patched:
        with patched.spans(Spans(((Span(3, 6),),))):
            got = model(ids).logits
        bias = torch.zeros(1, 1, 12)
        bias[..., 3:6] = math.log(4.0)
    with torch.no_grad(), attached(model, biased(bias, torch.tensor([6]))):
        truth = model(ids).logits
    assert_close(got, truth)


def test_a_row_without_spans_stays_plain() -> None:
    model = tiny("llama")
    got = emphasised(model, Emphasis(strength=STRENGTH, rows="all"), Spans(((), (Span(6, 8),))))
    assert_close(got[:LENGTH], plain(model)[:LENGTH])
    assert not torch.allclose(got[LENGTH:], plain(model)[LENGTH:], atol=1e-2)


def test_overlapping_spans_multiply() -> None:
    model = tiny("llama")
    overlapping = Spans(((Span(2, 5, 2.0), Span(4, 7, 3.0)), ()))
    parts = Spans(((Span(2, 4, 2.0), Span(4, 5, 6.0), Span(5, 7, 3.0)), ()))
    assert_close(emphasised(model, Emphasis(), overlapping), emphasised(model, Emphasis(), parts))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_strength_1_is_the_plain_model(name: str) -> None:
    model = tiny(name)
    difference = emphasised(model, Emphasis(strength=1.0), Spans(((Span(2, 5),), (Span(6, 8),)))) - plain(model)
    assert float(difference.abs().max()) <= 1e-5 * float(plain(model).abs().max())


def test_strength_0_is_masking_the_span() -> None:
    model = tiny("llama")
    spans = Spans(((Span(2, 5), Span(8, 9)), (Span(6, 8),)))
    got = emphasised(model, Emphasis(strength=0.0, rows="all"), spans)
    visible = additive_mask(torch.zeros(2, 1, LENGTH), None) == 0
    with torch.no_grad():
        truth = model(tokens(2, LENGTH), attention_mask=visible & ~UNION[:, None]).logits
    assert_close(got, truth[padding().bool()])


@pytest.mark.parametrize(("alpha", "strength"), [(0.01, 1.0), (0.3, 4.0), (0.0, 1.0)])
def test_outside_is_pastas_equation_on_the_union(alpha: float, strength: float) -> None:
    """Weights outside the spans times alpha, then each row divided by its sum: the paper's way round."""
    model = tiny("llama")

    def pasta(scores: Scores) -> Tensor:
        spans = scores.at_keys(UNION.double()).bool()
        weights = scores.softmax() * torch.where(spans, strength, alpha)
        changed = weights / weights.sum(3, keepdim=True)
        return torch.where(scores.rows_from(ENDS), changed, scores.softmax()).nan_to_num(0.0)

    spans = Spans(((Span(2, 5), Span(8, 9)), (Span(6, 8),)))
    got = emphasised(model, Emphasis(strength=strength, outside=alpha), spans)
    assert_close(got, expected(model, pasta))


def test_heads_of_each_layer() -> None:
    model, heads = tiny("llama"), {0: (1,), 2: (0, 3), 4: (2,)}
    got = emphasised(model, Emphasis(strength=STRENGTH, heads=heads))
    assert_close(got, expected(model, biased(LOG_STRENGTHS, ENDS, heads)))


def test_one_list_of_heads_and_layers() -> None:
    model, heads = tiny("gemma3_text"), {1: (0, 2), 3: (0, 2)}
    got = emphasised(model, Emphasis(strength=STRENGTH, rows="all", heads=[0, 2], layers=[1, 3]))
    assert_close(got, expected(model, biased(LOG_STRENGTHS, None, heads)))


def test_a_profile_names_the_heads(tmp_path: Any) -> None:
    scores = torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(3))
    profile = HeadProfile(scores.tolist(), keep=5)
    best = [divmod(int(place), HEADS) for place in scores.flatten().argsort(descending=True)[:5]]
    heads = {layer: tuple(head for at, head in best if at == layer) for layer in range(LAYERS)}
    model = tiny("llama")
    truth = expected(model, biased(LOG_STRENGTHS, ENDS, heads))
    assert_close(emphasised(model, Emphasis(strength=STRENGTH, heads=profile)), truth)
    path = str(profile.save(tmp_path / "profile.json"))
    assert_close(emphasised(model, Emphasis(strength=STRENGTH, heads=path)), truth)


def floor(share: float, first: Tensor | None, heads: tuple[int, ...] = tuple(range(HEADS))) -> Rewrite:
    """Spans get at least ``share`` of a row; what is left is shared out in proportion."""

    def rewrite(scores: Scores) -> Tensor:
        weights = scores.softmax()
        span = scores.at_keys(UNION.double()).bool()
        mine = torch.where(span, weights, 0.0).sum(3, keepdim=True)
        sees_others = (torch.where(span, -torch.inf, scores.table) > -torch.inf).any(3, keepdim=True)
        if scores.sink is not None:
            sees_others[:] = True
        heed = torch.zeros(HEADS, dtype=torch.bool)
        heed[list(heads)] = True
        shift = scores.rows_from(first) & heed[None, :, None, None] & (mine > 0) & (mine < share) & sees_others
        of_span, of_rest = (torch.where(shift, each, 0.5) for each in (mine, 1 - mine))  # no division by 0
        changed = torch.where(span, weights * share / of_span, weights * (1 - share) / of_rest)
        return torch.where(shift, changed, weights)

    return rewrite


@pytest.mark.parametrize("rows", ["after", "all"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mistral"])
def test_share_is_a_floor(name: str, rows: str) -> None:
    model = tiny(name)
    got = emphasised(model, Emphasis(share=0.4, rows=rows))
    assert_close(got, expected(model, floor(0.4, FIRST[rows])))


def test_share_in_some_heads() -> None:
    model = tiny("llama")
    got = emphasised(model, Emphasis(share=0.6, heads=[1, 2]))
    assert_close(got, expected(model, floor(0.6, ENDS, (1, 2))))


@pytest.mark.parametrize("policy", [Emphasis(strength=STRENGTH), Emphasis(share=0.4)], ids=["strength", "share"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_the_weights_that_a_model_returns(name: str, policy: Emphasis) -> None:
    model = tiny(name)
    rewrite = biased(LOG_STRENGTHS, ENDS) if policy.share is None else floor(0.4, ENDS)
    with torch.no_grad(), attnrb.patch(model, policy) as patched, patched.spans(SPANS):
        got = model(tokens(2, LENGTH), attention_mask=padding(), output_attentions=True).attentions
    with torch.no_grad(), attached(model, rewrite) as truth:
        model(tokens(2, LENGTH), attention_mask=padding())
    here = padding().bool()[:, None, :, None]
    for layer in range(LAYERS):
        torch.testing.assert_close(got[layer] * here, (truth[layer] * here).float(), atol=2e-5, rtol=0)


def gradients(model: Any, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    weighting = torch.randn(2, LENGTH, model.config.vocab_size, generator=torch.Generator().manual_seed(5))
    (run() * weighting)[padding().bool()].sum().backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("policy", [Emphasis(strength=STRENGTH), Emphasis(share=0.4)], ids=["strength", "share"])
def test_training(policy: Emphasis, checkpointing: bool) -> None:
    model, ids = tiny("llama"), tokens(2, LENGTH)
    rewrite = biased(LOG_STRENGTHS, ENDS) if policy.share is None else floor(0.4, ENDS)
    with attached(model, rewrite):
        truth = gradients(model, lambda: model(ids, attention_mask=padding()).logits)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    with attnrb.patch(model, policy) as patched, patched.spans(SPANS):
        got = gradients(model, lambda: model(ids, attention_mask=padding(), use_cache=False).logits)
    assert got.keys() == truth.keys()
    for name, gradient in truth.items():
        torch.testing.assert_close(got[name], gradient, atol=2e-4 * float(gradient.abs().max()), rtol=2e-3)


def test_spans_of_another_number_of_rows_are_refused() -> None:
    model = tiny("llama")
    message = "spans: expected those of 4 rows, or of a divisor of it, got those of 3"
    with (
        attnrb.patch(model, Emphasis()) as patched,
        patched.spans(Spans(((Span(1, 2),),) * 3)),
        pytest.raises(ValueError, match=message),
    ):
        model(tokens(4, 6))


def test_a_call_without_spans_is_plain_and_says_so_once() -> None:
    model, ids = tiny("llama"), tokens(1, 6)
    with torch.no_grad():
        truth = model(ids).logits
        with attnrb.patch(model, Emphasis()) as patched:
            with pytest.warns(UserWarning, match="spans of the prompt, and a call came without any"):
                assert_close(model(ids).logits, truth)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model(ids)
                with patched.spans(Spans(((),))):
                    model(ids)


@pytest.mark.parametrize("spans", [[(1, 2)], None, SPANS.rows], ids=["pairs", "none", "rows"])
def test_spans_of_another_type_are_refused(spans: Any) -> None:
    with (
        attnrb.patch(tiny("llama"), Emphasis()) as patched,
        pytest.raises(TypeError, match=r"spans: expected attnrb\.Spans"),
        patched.spans(spans),
    ):
        pass


def test_generate_wants_a_marked_prompt() -> None:
    with attnrb.patch(tiny("llama"), Emphasis()) as patched:
        marked: Any = tokens(1, 4)
        with pytest.raises(TypeError, match=r"marked: expected what attnrb\.mark returns"):
            patched.generate(marked)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strength": -1}, ValueError, "strength: expected 0 or above"),
        ({"strength": "8"}, TypeError, "strength: expected a number"),
        ({"strength": math.inf}, ValueError, "strength: expected a finite number"),
        ({"rows": "before"}, ValueError, "rows: expected one of after, all, last"),
        ({"share": 1.0}, ValueError, "share: expected a number between 0 and 1"),
        ({"share": 0.3, "outside": 0.1}, ValueError, "outside: expected without share"),
        ({"outside": -0.1}, ValueError, "outside: expected 0 or above"),
        ({"outside": "0.1"}, TypeError, "outside: expected a number"),
        ({"share": "0.3"}, TypeError, "share: expected a number"),
        ({"heads": "nowhere.json"}, FileNotFoundError, "there is no file 'nowhere.json'"),
        ({"layers": []}, ValueError, "layers: expected at least one"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Emphasis(**options)


def test_options_at_the_end_of_their_range() -> None:
    least = Emphasis(strength=0, outside=0)
    assert (least.strength, least.outside) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Emphasis(layers=[LAYERS]), "layers: the model's layers are 0 to 4"),
        (Emphasis(heads=[HEADS]), "heads: the model's heads are 0 to 3"),
        (Emphasis(heads=HeadProfile([[1.0, 2.0]], keep=1)), "heads: this profile is of a model with 1 layers of 2"),
    ],
)
def test_options_beyond_the_model(policy: Emphasis, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attnrb.patch(tiny("llama"), policy)
