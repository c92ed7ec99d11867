"""Learnt strengths of emphasis: they start as emphasis, get dense autograd's gradients, train alone, and are kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from attnrb import Emphasis, LearnedEmphasis, LearnedGains, Marked, Rebalance
from attnrb.policies.parse import parse_policy
from attnrb.studies.compare import compare
from attnrb.studies.generation import generate
from attnrb.studies.prompts import read_prompt
from edit_oracle import Rewrite, Scores, attached
from saved_tiny_model import tiny_model, tiny_tokenizer
from test_emphasis import ENDS, HEADS, LENGTH, SPANS, STRENGTH, UNION, emphasised, padding
from test_patch_models import assert_close
from test_training_patch import trainable
from tiny_models import LAYERS, tiny, tokens
from torch import Tensor

# Of SPANS: how many spans without a strength cover a slot, and ln of those that have one.
COUNTS, OWN = torch.zeros(2, 1, LENGTH), torch.zeros(2, 1, LENGTH)
COUNTS[0, 0, 2:5] = COUNTS[1, 0, 6:8] = 1.0
OWN[0, 0, 8] = math.log(3.0)
# The last token predicts none: with a prompt of all tokens, its row alone would have no part in a loss.
PROMPT = LENGTH - 4
FIRST = {"after": ENDS, "all": None, "last": torch.tensor([PROMPT - 1] * 2)}


def oracle(gains: Tensor, rows: str, outside: float = 0.0, chosen: dict[int, tuple[int, ...]] | None = None) -> Rewrite:
    """The definition with ``gains`` float64 ``[L, H]``, which pass a gradient on, and ln(outside)."""

    def rewrite(scores: Scores) -> Tensor:
        counts, own = scores.at_keys(COUNTS.double()), scores.at_keys(OWN.double())
        bias = own + counts * gains[scores.layer][None, :, None, None]
        if outside:
            prompt = torch.where(UNION, 0.0, outside).double()
            bias = bias + scores.at_keys(prompt)
        heed = torch.zeros(HEADS, dtype=torch.bool)
        heed[list(range(HEADS) if chosen is None else chosen.get(scores.layer, ()))] = True
        return scores.softmax(torch.where(scores.rows_from(FIRST[rows]) & heed[:, None, None], bias, 0.0))

    return rewrite


def loss(model: Any) -> Tensor:
    ids, mask = tokens(2, LENGTH), padding()
    labels = ids.masked_fill(mask == 0, -100)
    found: Tensor = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    return found


@pytest.mark.parametrize("options", [{}, {"heads": [1, 3]}, {"layers": [2, 4], "rows": "all"}, {"outside": 0.3}])
def test_they_start_as_emphasis(options: dict[str, Any]) -> None:
    model, policy = tiny("llama"), Emphasis(strength=STRENGTH, **options)
    learned = LearnedEmphasis(model, policy)
    assert_close(emphasised(model, learned), emphasised(model, policy))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    chosen = range(HEADS) if "heads" not in options else options["heads"]
    expected = torch.zeros(LAYERS, HEADS)
    for layer in options.get("layers", range(LAYERS)):
        expected[layer, list(chosen)] = math.log(STRENGTH)
    assert torch.equal(learned.matrix(), expected)


@pytest.mark.parametrize("rows", ["after", "all", "last"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2"])
def test_their_gradient_is_that_of_dense_autograd(name: str, rows: str) -> None:
    model = trainable(name)
    learned = LearnedEmphasis(model, Emphasis(rows=rows))  # freezes the model for the oracle too
    start = torch.randn(LAYERS, HEADS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    start.requires_grad_()
    with attached(model, oracle(start, rows)):
        loss(model).backward()
    with torch.no_grad():
        learned.gains.copy_(start)
    with attnrb.patch(model, learned) as patched, patched.spans(SPANS, prompt=PROMPT):
        loss(model).backward()
    assert start.grad is not None and learned.gains.grad is not None
    expected = start.grad.float()
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(learned.gains.grad, expected, rtol=1e-3, atol=1e-4 * scale)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_beside_weakened_keys() -> None:
    model = trainable()
    start = torch.full((LAYERS, HEADS), 0.5, dtype=torch.float64, requires_grad=True)
    with attached(model, oracle(start, "after", math.log(0.2))):
        loss(model).backward()
    learned = LearnedEmphasis(model, Emphasis(strength=math.exp(0.5), outside=0.2))
    with attnrb.patch(model, learned) as patched, patched.spans(SPANS, prompt=LENGTH):
        loss(model).backward()
    assert start.grad is not None and learned.gains.grad is not None
    expected = start.grad.float()
    torch.testing.assert_close(learned.gains.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["", "checkpointing", "re-entrant"])
def test_they_train_alone(checkpointing: bool | None) -> None:
    """With other spans in every step."""
    model = trainable()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    learned = LearnedEmphasis(model, Emphasis(strength=1.0, heads=[0, 2, 3]))
    start = learned.gains.detach().clone()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        if checkpointing:
            model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(learned.parameters(), lr=0.05, weight_decay=0.0)
    several = (SPANS, attnrb.Spans(((attnrb.Span(1, 4),), (attnrb.Span(9, 12),))))
    losses: list[list[float]] = [[], []]
    with attnrb.patch(model, learned) as patched:
        for step in range(16):
            with patched.spans(several[step % 2]):
                found = loss(model)
                optimizer.zero_grad()
                found.backward()
                optimizer.step()
                losses[step % 2].append(float(found.detach()))
    for mine in losses:
        assert mine[-1] < mine[0]
    moved = (learned.gains.detach() != start).any(0)
    assert moved.tolist() == [True, False, True, True], "a head that is left out keeps its 0"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def random_strengths(model: Any, **options: Any) -> LearnedEmphasis:
    learned = LearnedEmphasis(model, Emphasis(**options))
    with torch.no_grad():
        learned.gains.normal_(1.0, 1.0, generator=torch.Generator().manual_seed(4))
    return learned


def test_a_step_of_the_optimizer_counts_within_one_request() -> None:
    model = tiny("llama")
    learned = random_strengths(model)
    with torch.no_grad(), attnrb.patch(model, learned) as patched, patched.spans(SPANS):
        first = model(tokens(2, LENGTH), attention_mask=padding()).logits
        learned.gains += 0.5
        second = model(tokens(2, LENGTH), attention_mask=padding()).logits
    assert not torch.equal(first, second)
    assert_close(second[padding().bool()], emphasised(model, learned))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generate(options: dict[str, Any]) -> None:
    model = tiny("llama")
    heads: dict[int, tuple[int, ...]] = {0: (1, 2), 3: (0, 1, 2, 3)}
    learned = random_strengths(model, heads=heads).requires_grad_(False)
    marked = Marked({"input_ids": tokens(2, LENGTH), "attention_mask": padding()}, SPANS)
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    with attnrb.patch(model, learned) as patched:
        got = patched.generate(marked, **options)
    with attached(model, oracle(learned.matrix().double(), "after", chosen=heads)):
        truth = model.generate(**marked.inputs, **options)
    assert got.tolist() == truth.tolist()


@pytest.mark.parametrize("place", ["folder", "strengths.safetensors"])
def test_saved_and_loaded_they_do_the_same(tmp_path: Path, place: str) -> None:
    model = tiny("llama")
    learned = random_strengths(model, heads={2: [0, 1], 4: [3]}, rows="all", outside=0.5)
    file = learned.save(tmp_path / "new" / place)
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    path = str(tmp_path / "new" / place)
    for loaded in (LearnedEmphasis.load(path), parse_policy(path), attnrb.Policy.from_dict(learned.to_dict())):
        assert isinstance(loaded, LearnedEmphasis)
        assert loaded.config == learned.config
        assert not loaded.gains.requires_grad
        assert torch.equal(emphasised(model, loaded), emphasised(model, learned))
        assert loaded.label() == learned.label()
    assert LearnedEmphasis.load(file, trainable=True).gains.requires_grad
    with pytest.raises(
        ValueError, match=r"expected learnt gains \(attnrb\.LearnedGains\), got attnrb\.LearnedEmphasis"
    ):
        LearnedGains.load(file)


def test_two_kinds_of_gains_in_one_folder(tmp_path: Path) -> None:
    model = tiny("llama")
    emphasis, gains = LearnedEmphasis(model), LearnedGains(model)
    for each in (emphasis, gains):
        each.save(tmp_path)
        assert torch.equal(type(each).load(tmp_path).matrix(), each.matrix())
    with pytest.raises(
        ValueError, match=r"expected one file of learnt gains, got learned_gains\.safetensors, learned_emp"
    ):
        parse_policy(str(tmp_path))
    assert isinstance(parse_policy(str(tmp_path / "learned_emphasis.safetensors")), LearnedEmphasis)


def test_comparing_and_generating_take_them(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    learned = random_strengths(model).requires_grad_(False)
    found = compare(model, tokenizer, "the ((lazy dog)) walks", learned, max_new_tokens=4)
    assert found.spans is not None and found.span_plain != found.span_edited
    read = read_prompt(model, tokenizer, "the ((lazy dog)) walks", learned)
    with read.patch(model):
        assert generate(model, tokenizer, read.input_ids, max_new_tokens=4).token_ids == found.rebalanced.token_ids


def test_a_graph_serves_other_spans_and_trains() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = trainable()
    learned = random_strengths(model)
    several = (SPANS, attnrb.Spans(((attnrb.Span(1, 4),), (attnrb.Span(9, 12),))))
    ids, mask = tokens(2, LENGTH), padding()
    with attnrb.patch(model, learned) as patched:

        def gradient(run: Any, spans: attnrb.Spans) -> Tensor:
            with patched.spans(spans, prompt=LENGTH):
                out = run(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].square().mean()
            [found] = torch.autograd.grad(out, learned.gains)
            return found

        eager = [gradient(model, spans) for spans in several]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for spans, expected in zip(several, eager, strict=True):
            torch.testing.assert_close(
                gradient(compiled, spans), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
            )
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (Emphasis(share=0.5), ValueError, "config: expected one without share"),
        (Emphasis(strength=0.0), ValueError, "config: expected a strength above 0 to start from"),
        (Rebalance(), TypeError, "config: expected an attnrb.Emphasis or None, got Rebalance"),
        (Emphasis(heads={LAYERS: (0,)}), ValueError, "heads: the model's layers are 0 to 4"),
    ],
)
def test_what_cannot_be_learnt(config: Any, error: type[Exception], message: str) -> None:
    model = tiny("llama")
    with pytest.raises(error, match=message):
        LearnedEmphasis(model, config)
    assert all(parameter.requires_grad for parameter in model.parameters()), "nothing is frozen by what fails"


def test_a_model_of_another_shape_is_refused() -> None:
    learned = LearnedEmphasis(tiny("llama"))
    with pytest.raises(ValueError, match="these gains are of a model with 5 layers of 4 heads"):
        attnrb.patch(tiny_model(), learned)
