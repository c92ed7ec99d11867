"""Batches whose rows have policies of their own: equal to each row served by itself, in float64, as a patch does it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attnrb import Compose, Custom, Edit, Emphasis, LearnedGains, Policy, Rebalance, SinkDamping, Visibility
from attnrb.functional import attention, write_keys
from attnrb.hosts.vllm import attend as attending
from attnrb.hosts.vllm.asked import Ask, policy_text
from attnrb.hosts.vllm.attend import Forward, Layer, LayerScores, Step, attend
from attnrb.hosts.vllm.batch import Batch, Row, Rows
from attnrb.hosts.vllm.merging import Merging, Share
from attnrb.ops.edit import EditArguments
from attnrb.ops.paging import Paging
from attnrb.policies import Mixture, ModelShape, Plain
from attnrb.policies.base import LayerPlan, LayerView
from attnrb.text.spans import Span
from torch import Tensor

LAYERS, HEADS, KEY_HEADS, WIDTH, BLOCK = 4, 4, 2, 16, 8
SHAPE = ModelShape(LAYERS, HEADS)
SINKS = torch.tensor([0.5, -1.0, 0.0, 1.0])
# Of a row, whose entries are sums of at most 100 weighed values around 1 in size, computed in float32.
TOLERANCE = 100 * torch.finfo(torch.float32).eps


def learned() -> LearnedGains:
    gains = LearnedGains(SHAPE, Rebalance(alpha=0.7)).requires_grad_(False)
    gains.gains.copy_(torch.linspace(-0.5, 2.0, gains.gains.numel()).view_as(gains.gains))
    return gains


def first_key_twice(view: LayerView) -> Edit:
    """Looks at its keys, as a policy of a user's may."""
    largest = view.key.abs().sum(-1).argmax(-1)
    bias = torch.zeros(1, HEADS, view.key.shape[2], dtype=torch.float32)
    bias.scatter_(2, largest.repeat_interleave(HEADS // KEY_HEADS, 1)[..., None], 1.0)
    return Edit(key_bias=bias)


POLICIES: list[Policy | None] = [
    None,
    Rebalance(alpha=1.5, threshold=0.05),
    Rebalance(alpha=0.8, threshold=0.1, normalize=True, source_layer=1, heads=[0, 3]),
    Rebalance(alpha=0.5, boost_all=True),
    Emphasis(strength=6.0),
    Emphasis(strength=0.0, rows="all", heads={1: (0, 2), 3: (1,)}),
    Emphasis(strength=3.0, rows="last", outside=0.5),
    Emphasis(share=0.4, layers=[1, 2]),
    SinkDamping(threshold=0.08, first_key=0.5),
    learned(),
    Compose(Emphasis(strength=4.0), Rebalance(alpha=1.0, threshold=0.05)),
    Compose(Emphasis(share=0.4, layers=[1]), Rebalance(alpha=1.0, threshold=0.05, layers=[2, 3])),
    Custom(first_key_twice),
]


PLANS: dict[int, LayerPlan] = {}
"""By the id of a policy above: texts of one policy are a group."""


@dataclass
class Text:
    """One text of a batch: its queries, keys and values ``[L, heads, N, D]``, and what is asked for."""

    query: Tensor
    key: Tensor
    value: Tensor
    policy: Policy | None
    spans: tuple[Span, ...]
    prompt: int
    row: Row
    kept: dict[Any, Any]

    @property
    def wants_spans(self) -> bool:
        return bool(self.spans)


def text(generator: torch.Generator, numbers: random.Random, policy: Policy | None, tokens: int) -> Text:
    def draw(heads: int) -> Tensor:
        return torch.randn(LAYERS, heads, tokens, WIDTH, generator=generator)

    prompt = max(3, tokens - numbers.randrange(4))
    plan = None if policy is None else PLANS.setdefault(id(policy), policy.resolve(SHAPE))
    spans: tuple[Span, ...] = ()
    if plan is not None and plan.wants_spans and numbers.random() < 0.8:
        start = numbers.randrange(prompt - 1)
        spans = (Span(start, numbers.randrange(start + 1, prompt)),)
        if numbers.random() < 0.5:
            spans += (Span(start, start + 1, 2.5),)
    return Text(
        draw(HEADS) * 1.5, draw(KEY_HEADS), draw(KEY_HEADS), policy, spans, prompt, Row(plan, spans, prompt, {}), {}
    )


def alone(one: Text, start: int, end: int, window: int | None, sinks: Tensor | None) -> Tensor:
    """The queries ``start`` to ``end`` of a text by itself: ``[L, end - start, H, D]``, float64."""
    plan = one.row.plan
    own = Row(plan, one.spans, one.prompt, one.kept).request()
    session = None if plan is None else plan.begin(own)
    found = []
    for layer in range(LAYERS):
        query = one.query[layer][None, :, start:end].double()
        key, value = (each[layer][None, :, :end].double() for each in (one.key, one.value))
        scores = {
            "visibility": Visibility(query_offset=start, window=window),
            "scale": None,
            "softcap": None,
            "sinks": sinks,
        }
        view = LayerView(layer, query, key, lambda scores=scores: scores)  # type: ignore[misc]
        edit = session.edit(view) if session is not None and plan is not None and layer in plan.edited else None
        emit = None if plan is None else plan.emits.get(layer)
        if isinstance(edit, Mixture):
            parts = [attention(query, key, value, edit=each, **its) for each, its in edit.parts(view)]
            shares = edit.weigh([part.lse for part in parts], view)
            output = sum(share[..., None] * part.output for share, part in zip(shares, parts, strict=True))
            outliers = attention(query, key, value, emit=emit, **scores).outliers  # type: ignore[arg-type]
        else:
            output, _, outliers = attention(query, key, value, edit=edit, emit=emit, **scores)  # type: ignore[arg-type]
        if outliers is not None and session is not None:
            session.emitted(layer, outliers)
        assert isinstance(output, Tensor)
        found.append(output[0].transpose(0, 1))
    return torch.stack(found)


class Pool:
    """Blocks of one layer after another, handed out at random."""

    def __init__(self, generator: torch.Generator, blocks: int) -> None:
        self.key = torch.full((LAYERS, blocks, KEY_HEADS, BLOCK, WIDTH), float("nan"))
        self.value = torch.full_like(self.key, float("nan"))
        self.free = torch.randperm(blocks, generator=generator).tolist()

    def take(self, tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-tokens // BLOCK))]


def together(
    texts: Sequence[Text], ranges: Sequence[tuple[int, int]], tables: Sequence[list[int]], pool: Pool,
    batch: Batch, window: int | None, sinks: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """The same for all texts in one step."""
    counts = torch.tensor([end - start for start, end in ranges])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32)
    widest = max(len(table) for table in tables)
    block_table = torch.tensor([table + [0] * (widest - len(table)) for table in tables], dtype=torch.int32)
    lengths = torch.tensor([end for _, end in ranges], dtype=torch.int32)
    step = Step(Paging(block_table, starts, lengths))
    forward = Forward(batch, step)
    slots = torch.tensor(
        [
            table[slot // BLOCK] * BLOCK + slot % BLOCK
            for table, (start, end) in zip(tables, ranges, strict=True)
            for slot in range(start, end)
        ]
    )
    scores = LayerScores(window, None, None, sinks)
    found = []
    for layer in range(LAYERS):

        def rows(which: str, layer: int = layer) -> Tensor:
            parts = [
                getattr(one, which)[layer][:, start:end].transpose(0, 1)
                for one, (start, end) in zip(texts, ranges, strict=True)
            ]
            return torch.cat(parts)

        write_keys(rows("key"), rows("value"), pool.key[layer], pool.value[layer], slots)
        query = rows("query")
        out = torch.full_like(query, float("nan"))
        attend(Layer(layer, query, pool.key[layer], pool.value[layer], scores, out), step, forward)
        found.append(out)
    return list(torch.stack(found).split(counts.tolist(), 1))


@pytest.mark.parametrize("seed", range(24))
def test_a_batch_is_its_rows(seed: int) -> None:
    generator, numbers = torch.Generator().manual_seed(seed), random.Random(seed)
    window = numbers.choice([None, None, 7])
    sinks = numbers.choice([None, SINKS])
    chosen = [numbers.choice(POLICIES) for _ in range(numbers.randrange(1, 9))]
    if seed < len(POLICIES):
        chosen += [POLICIES[seed]] * 3
    texts = [text(generator, numbers, policy, numbers.randrange(4, 30)) for policy in chosen]
    pool = Pool(generator, 64)
    tables = [pool.take(one.query.shape[2]) for one in texts]
    # Each text in two steps: its first tokens, and then the rest; a policy that keeps something reads prompts whole.
    ends = [one.query.shape[2] for one in texts]
    cuts = [
        one.prompt if one.row.plan is not None and one.row.plan.keeps else numbers.randrange(1, end)
        for one, end in zip(texts, ends, strict=True)
    ]
    batch = Batch([one.row for one in texts])
    for ranges in ([(0, cut) for cut in cuts], [(cut, end) for cut, end in zip(cuts, ends, strict=True) if cut < end]):
        if len(ranges) < len(texts):
            break  # nothing is left of some text
        got = together(texts, ranges, tables, pool, batch, window, sinks)
        for one, (start, end), found in zip(texts, ranges, got, strict=True):
            wanted = alone(one, start, end, window, sinks)
            assert (found.double() - wanted).abs().max() <= TOLERANCE * max(1.0, float(wanted.abs().max())), one.policy


@pytest.mark.parametrize(
    ("policies", "calls"),
    [
        # Plain, biased and strengthened rows, some of them both, whose thresholds agree.
        (
            [
                None,
                Rebalance(alpha=1.5, threshold=0.05),
                Emphasis(strength=6.0),
                Rebalance(alpha=0.3, threshold=0.05, heads=[0, 3]),
                Emphasis(strength=3.0, rows="last", outside=0.5),
                Compose(Emphasis(strength=4.0), Rebalance(alpha=1.0, threshold=0.05)),
            ],
            [1, 1, 1, 1],
        ),
        # Two thresholds: a call each in the layer that finds outliers, and tables put together above it.
        ([Rebalance(alpha=1.5, threshold=0.05), Rebalance(alpha=0.5, threshold=0.1), None], [2, 1, 1, 1]),
        # Two rules: a call each in the layers that strengthen them; the last layer's gains are 0.
        (
            [Rebalance(threshold=0.05), Rebalance(threshold=0.05, normalize=True), Emphasis(strength=2.0)],
            [1, 2, 2, 1],
        ),
    ],
)
def test_a_mixed_batch_has_few_calls(
    policies: list[Policy | None], calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, numbers = torch.Generator().manual_seed(7), random.Random(7)
    texts = [text(generator, numbers, policy, numbers.randrange(6, 30)) for policy in policies]
    pool = Pool(generator, 64)
    ranges = [(0, one.query.shape[2]) for one in texts]
    tables = [pool.take(end) for _, end in ranges]
    counted: list[int] = []
    serve = attending.attend_blocks

    def counting(query: Tensor, key: Tensor, *rest: Any) -> Any:
        layer = next(at for at in range(LAYERS) if pool.key[at].data_ptr() == key.data_ptr())
        counted.append(layer)
        return serve(query, key, *rest)

    monkeypatch.setattr(attending, "attend_blocks", counting)
    got = together(texts, ranges, tables, pool, Batch([one.row for one in texts]), None, SINKS)
    assert [counted.count(layer) for layer in range(LAYERS)] == calls
    for one, (start, end), found in zip(texts, ranges, got, strict=True):
        wanted = alone(one, start, end, None, SINKS)
        assert (found.double() - wanted).abs().max() <= TOLERANCE * max(1.0, float(wanted.abs().max())), one.policy


def test_what_a_share_says_of_other_rows_does_not_count() -> None:
    starts = torch.tensor([0, 2, 3, 5])
    indices, counts = torch.zeros(5, HEADS, 1, dtype=torch.int32), torch.ones(5, HEADS, dtype=torch.int32)
    gain, bias = torch.arange(4.0), torch.full((1, 1, 3), 2.0)
    shares = [
        Share((0,), EditArguments(indices, counts, gain)),
        Share((2,), EditArguments(key_bias=bias, first_query=torch.tensor([4, 5, 6]))),
        Share((1,)),
    ]
    (call,) = Merging(starts).calls(shares)
    edit = call.edit
    assert call.rows == (0, 1, 2)
    assert edit.counts is not None
    assert edit.counts[:, 0].tolist() == [1, 1, 0, 0, 0]
    assert edit.gain is gain
    assert edit.key_bias is not None
    assert edit.key_bias[:, 0].tolist() == [[0.0] * 3, [0.0] * 3, [2.0] * 3]
    assert edit.first_query is not None
    assert edit.first_query[2] == 6
    assert (edit.first_query[:2] > 1 << 40).all()


def test_rows_follow_what_they_are_told() -> None:
    rows = Rows(Plain(), SHAPE)
    asked = [Ask(policy_text(Rebalance(alpha=alpha)), prompt=4).to_text() for alpha in (0.1, 0.2)]
    rows.change(added={0: asked[0], 1: None, 2: asked[1], 3: asked[0]})

    def plans(count: int) -> list[Any]:
        found: list[Any] = [None] * count
        batch = rows.batch(count)
        for group in batch.groups:
            for row in group.rows:
                assert group.plan is not None
                found[row] = group.plan.policy.alpha if hasattr(group.plan, "policy") else float(gain(group.plan))
        return found

    def gain(plan: LayerPlan) -> float:
        view = LayerView(1, torch.zeros(1, HEADS, 1, 2), torch.zeros(1, 1, 1, 2), dict)
        return round(float(plan.gain(view)[0]) / (1 - 1 / (LAYERS - 1)), 6)  # type: ignore[attr-defined]

    assert plans(4) == [0.1, None, 0.2, 0.1]
    assert [group.rows for group in rows.batch(4).groups] == [(0, 3), (2,)]
    rows.change(moved=[(0, 1, True)])
    assert plans(4) == [None, 0.1, 0.2, 0.1]
    rows.change(removed=[1], moved=[(3, 1, False)])
    assert plans(3) == [None, 0.1, 0.2]
    assert rows.batch(3) is rows.batch(3)


def test_a_preempted_text_keeps_what_was_found_in_it() -> None:
    rows = Rows(Plain(), SHAPE)
    asked = Ask.of_options({"policy": "sinks"}, Plain(), SHAPE, [5] * 6)
    assert asked is not None
    assert asked.sequence is not None
    rows.change(added={0: asked.to_text()})
    rows.batch(1).groups[0].members[0].sequence["found"] = 1
    rows.change(removed=[0])
    rows.change(added={0: asked.to_text()})
    assert rows.batch(1).groups[0].members[0].sequence == {"found": 1}


def test_a_policy_that_reads_no_keys_must_not_look_at_them() -> None:
    def looks(view: LayerView) -> Edit:
        return Edit(key_bias=torch.zeros(1, 1, view.key_slots()))

    plan = Custom(looks).resolve(SHAPE)
    plan.reads_keys = False
    layer = Layer(0, torch.zeros(2, HEADS, WIDTH), torch.zeros(1, KEY_HEADS, BLOCK, WIDTH),
                  torch.zeros(1, KEY_HEADS, BLOCK, WIDTH), LayerScores(None, None, None, None),
                  torch.zeros(2, HEADS, WIDTH))  # fmt: skip
    step = Step(Paging(torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 2]), torch.tensor([2])))
    with pytest.raises(RuntimeError, match="reads_keys"):
        attend(layer, step, Forward(Batch([Row(plan, (), 2)]), step))


def test_attnrb_policies_that_read_keys_are_those_that_must() -> None:
    reading = {policy.name for policy in POLICIES if policy is not None and policy.resolve(SHAPE).reads_keys}
    assert reading == {"sinks", "custom"}
