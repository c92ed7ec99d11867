"""Emphasis through generation: every cache, beams, prompts read in parts, later turns, threads, graphs."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import attnrb
import pytest
import torch

pytest.importorskip("transformers")

from attnrb import Emphasis, Marked, Span, Spans
from edit_oracle import attached, biased
from saved_tiny_model import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from test_emphasis import ENDS, FIRST, LENGTH, LOG_STRENGTHS, SPANS, STRENGTH, UNION, padding
from test_patch_compile import before_5_4
from test_patch_models import assert_close
from tiny_models import tiny, tokens
from torch import Tensor
from torch._dynamo.utils import counters

NEW = 10


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def marked_batch() -> Marked:
    return Marked({"input_ids": tokens(2, LENGTH), "attention_mask": padding()}, SPANS)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"cache_implementation": "static"}),
        ("llama", {"use_cache": False}),
        ("llama", {"num_beams": 3}),
        ("llama", {"num_beams": 4, "num_return_sequences": 2}),
        ("llama", {"do_sample": True, "num_return_sequences": 3}),
        ("gemma3_text", {}),
        ("gemma3_text", {"cache_implementation": "static"}),
        ("gemma2", {"num_beams": 2}),
        ("mistral", {}),
        ("gpt_oss", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(f"{key}={each}" for key, each in value.items()),
)
def test_generate(name: str, options: dict[str, Any]) -> None:
    model, batch = tiny(name), marked_batch()
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    with attnrb.patch(model, Emphasis(strength=STRENGTH)) as patched:
        torch.manual_seed(1)
        got = patched.generate(batch, **options)
    with attached(model, biased(LOG_STRENGTHS, ENDS)):
        torch.manual_seed(1)
        truth = model.generate(**batch.inputs, **options)
    plain = model.generate(**batch.inputs, **options)
    assert got.tolist() == truth.tolist()
    assert options["do_sample"] or got.tolist() != plain.tolist()


def test_assisted_decoding() -> None:
    """Guesses are read with the prompt, taken back from the cache, and read again: spans stay where they are."""
    model, helper, ids = tiny("llama"), tiny("llama", num_hidden_layers=2), tokens(1, LENGTH)
    marked = Marked({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, Spans((SPANS[0],)))
    for rows in ("after", "last"):
        with attnrb.patch(model, Emphasis(strength=STRENGTH, rows=rows)) as patched:
            alone = patched.generate(marked, max_new_tokens=NEW, do_sample=False)
            assisted = patched.generate(marked, max_new_tokens=NEW, do_sample=False, assistant_model=helper)
        assert assisted.tolist() == alone.tolist()


@pytest.mark.usefixtures("dynamo")
@torch.no_grad()
def test_decoding_in_a_graph_serves_other_spans() -> None:
    from transformers import StaticCache

    model, ids = tiny("llama"), tokens(2, LENGTH + 4)
    chosen = [SPANS, Spans(((Span(3, 6),), (Span(5, 6), Span(10, 11))))]
    with attnrb.patch(model, Emphasis(strength=STRENGTH, rows="last")) as patched:

        def logits(run: Any, spans: Spans) -> Tensor:
            with patched.spans(spans, prompt=LENGTH):
                cache = StaticCache(config=model.config, max_cache_len=LENGTH + 4)
                found = [model(ids[:, :LENGTH], past_key_values=cache).logits]
                for slot in range(LENGTH, LENGTH + 4):
                    position = {"cache_position": torch.tensor([slot])} if before_5_4() else {}
                    found.append(run(ids[:, slot : slot + 1], past_key_values=cache, **position).logits)
            return torch.cat(found, 1)

        eager = [logits(model, spans) for spans in chosen]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        graphs = []
        for spans, expected in zip(chosen, eager, strict=True):
            assert_close(logits(compiled, spans), expected)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("rows", ["after", "all", "last"])
def test_rows_while_decoding(rows: str) -> None:
    model, batch = tiny("llama"), marked_batch()
    with attnrb.patch(model, Emphasis(strength=STRENGTH, rows=rows)) as patched:
        got = patched.generate(batch, max_new_tokens=NEW, do_sample=False)
    with attached(model, biased(LOG_STRENGTHS, FIRST[rows])):
        truth = model.generate(**batch.inputs, max_new_tokens=NEW, do_sample=False)
    assert got.tolist() == truth.tolist()


def test_generated_keys_are_not_outside_the_spans() -> None:
    model, batch = tiny("llama"), marked_batch()
    with attnrb.patch(model, Emphasis(strength=1.0, outside=0.05)) as patched:
        spans = Spans(tuple(tuple(Span(each.start, each.end) for each in row) for row in SPANS))
        got = patched.generate(Marked(batch.inputs, spans), max_new_tokens=NEW, do_sample=False)
    weaker = torch.where(UNION, 0.0, math.log(0.05))  # LENGTH slots: those behind the prompt have none
    with attached(model, biased(weaker, ENDS)):
        truth = model.generate(**batch.inputs, max_new_tokens=NEW, do_sample=False)
    assert got.tolist() == truth.tolist()


def in_parts(model: Any, ids: Tensor, ends: list[int]) -> Tensor:
    """The logits of a batch that is read in several calls."""
    cache, logits, start = None, [], 0
    for end in ends:
        out = model(ids[:, start:end], attention_mask=padding()[:, :end], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, end
        logits.append(out.logits)
    return torch.cat(logits, 1)[padding().bool()]


@pytest.mark.parametrize(
    "policy",
    [Emphasis(strength=STRENGTH), Emphasis(strength=STRENGTH, rows="last"), Emphasis(outside=0.1), Emphasis(share=0.4)],
    ids=["after", "last", "outside", "share"],
)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@torch.no_grad()
def test_a_prompt_read_in_parts(name: str, policy: Emphasis) -> None:
    model, ids = tiny(name), tokens(2, LENGTH)
    with attnrb.patch(model, policy) as patched:
        with patched.spans(SPANS, prompt=LENGTH):
            whole = in_parts(model, ids, [LENGTH])
        with patched.spans(SPANS, prompt=torch.tensor([LENGTH] * 2)):
            assert_close(in_parts(model, ids, [3, 4, 7, 8, 13, LENGTH]), whole)


@torch.no_grad()
def test_a_later_turn_on_a_kept_cache() -> None:
    """Spans of the first turn stay where their keys are, and those of the second come beside them."""
    model, ids = tiny("llama"), tokens(1, 20)
    first, second = Span(2, 4), Span(13, 15, 3.0)
    bias = torch.zeros(1, 1, 15)
    with attnrb.patch(model, Emphasis(strength=STRENGTH)) as patched:
        with patched.spans(Spans(((first,),))):
            cache = model(ids[:, :12], use_cache=True).past_key_values
        with patched.spans(Spans(((first, second),))):
            got = model(ids[:, 12:], past_key_values=cache).logits
    bias[..., 2:4] = math.log(STRENGTH)
    with attached(model, biased(bias, torch.tensor([4]))):
        cache = model(ids[:, :12], use_cache=True).past_key_values
    bias[..., 13:15] = math.log(3.0)
    with attached(model, biased(bias, torch.tensor([15]))):
        truth = model(ids[:, 12:], past_key_values=cache).logits
    assert_close(got, truth)


@torch.no_grad()
def test_one_request_within_another() -> None:
    model, ids = tiny("llama"), tokens(1, 12)
    outer, inner = Spans(((Span(1, 3),),)), Spans(((Span(5, 7),),))
    with attnrb.patch(model, Emphasis(strength=STRENGTH)) as patched, patched.spans(outer):
        alone = model(ids).logits
        with patched.spans(inner):
            assert not torch.equal(model(ids).logits, alone)
        assert torch.equal(model(ids).logits, alone)


def test_a_marked_text_and_a_marked_chat() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(CHAT_TEMPLATE)
    for content in ("the ((lazy dog)) walks", [{"role": "user", "content": "the ((lazy dog)) walks"}]):
        marked = attnrb.mark(tokenizer, content)
        assert bool(marked.spans)
        with attnrb.patch(model, Emphasis(strength=STRENGTH)) as patched:
            got = patched.generate(marked, max_new_tokens=5, do_sample=False)
        bias = marked.spans.log_strengths(STRENGTH)[:, None]
        with attached(model, biased(bias, marked.spans.ends())):
            truth = model.generate(**marked.inputs, max_new_tokens=5, do_sample=False)
        assert got.tolist() == truth.tolist()


@torch.no_grad()
def test_two_threads_with_spans_of_their_own() -> None:
    model, ids = tiny("llama"), tokens(1, 24)
    chosen = [Spans(((Span(start, start + 3),),)) for start in (2, 11)]
    with attnrb.patch(model, Emphasis(strength=STRENGTH)) as patched:

        def logits(spans: Spans) -> Tensor:
            with patched.spans(spans):
                found: Tensor = model(ids).logits
            return found

        alone = [logits(spans) for spans in chosen]
        assert not torch.equal(*alone)
        both, results = threading.Barrier(2), {}

        def serve(place: int) -> None:
            torch.set_num_threads(1)
            both.wait(timeout=600)  # a machine may be busy
            results[place] = [logits(chosen[place]) for _ in range(5)]

        threads = [threading.Thread(target=serve, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for place in range(2):
        for found in results[place]:
            assert_close(found, alone[place])


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(
    "policy",
    [Emphasis(strength=STRENGTH), Emphasis(strength=STRENGTH, heads={1: (0, 2)}), Emphasis(outside=0.2)],
    ids=["all heads", "some heads", "outside"],
)
@torch.no_grad()
def test_a_changed_span_is_no_new_graph(policy: Emphasis) -> None:
    model, ids = tiny("llama"), tokens(2, LENGTH)
    chosen = [SPANS, Spans(((Span(3, 6),), (Span(5, 6), Span(10, 11)))), Spans(((Span(0, 1, 3.0),), (Span(7, 9),)))]
    with attnrb.patch(model, policy) as patched:

        def logits(run: Any, spans: Spans) -> Tensor:
            with patched.spans(spans, prompt=LENGTH):
                found: Tensor = run(ids, use_cache=False).logits
            return found

        eager = [logits(model, spans) for spans in chosen]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for spans, expected in zip(chosen, eager, strict=True):
            assert_close(logits(compiled, spans), expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("dynamo")
def test_a_graph_must_be_told_where_the_prompt_ends() -> None:
    model = tiny("llama")
    with attnrb.patch(model, Emphasis(rows="last")) as patched, patched.spans(SPANS):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="prompt: expected one in a graph"):
            compiled(tokens(2, LENGTH), use_cache=False)
