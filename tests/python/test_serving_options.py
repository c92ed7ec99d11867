"""What a served request may ask for, what is refused in a sentence, and which requests share cached keys."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import attnrb
import pytest
from attnrb import Emphasis, LearnedGains, Policy, Rebalance, SinkDamping
from attnrb.hosts.vllm import requests_of
from attnrb.hosts.vllm.asked import Ask, digest, engine_policy, wants_spans
from attnrb.policies import Compose, ModelShape, Plain
from attnrb.text.spans import Span
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPE = ModelShape(4, 4)
PROMPT = list(range(10, 30))


def asked(options: Any, default: Policy = Plain()) -> Ask | None:  # noqa: B008
    return Ask.of_options(options, default, SHAPE, PROMPT)


def policy_of(ask: Ask | None) -> Policy:
    assert ask is not None
    return Policy.from_dict(json.loads(ask.policy))


@pytest.mark.parametrize(
    ("options", "default", "policy"),
    [
        (None, Rebalance(alpha=0.4), Rebalance(alpha=0.4)),
        ({}, Rebalance(alpha=0.4), Rebalance(alpha=0.4)),
        ({"alpha": 1.0}, Rebalance(threshold=0.02), Rebalance(alpha=1.0, threshold=0.02)),
        ('{"alpha": 1}', Rebalance(), Rebalance(alpha=1.0)),
        ({"alpha": 1.0}, Plain(), Rebalance(alpha=1.0)),
        ({"alpha": 1.0}, Rebalance(threshold=1e-5), Rebalance(alpha=1.0, threshold=1e-5)),
        ({"policy": "sinks"}, Rebalance(), SinkDamping()),
        ({"spans": [[0, 2]]}, Plain(), Emphasis()),
        ({"strength": 3, "spans": [[0, 2]]}, Emphasis(rows="all"), Emphasis(strength=3, rows="all")),
        (
            {"policy": "compose", "policies": [{"policy": "emphasis"}, {"policy": "rebalance"}], "spans": [[1, 2]]},
            Plain(),
            Compose(Emphasis(), Rebalance()),
        ),
    ],
)
def test_options_mean_a_policy(options: Any, default: Policy, policy: Policy) -> None:
    assert policy_of(asked(options, default)).to_dict() == policy.to_dict()


@pytest.mark.parametrize(
    ("options", "default"),
    [
        ("off", Rebalance()),
        ({"policy": "off"}, Rebalance()),
        (None, Plain()),
        ({"alpha": 0}, Rebalance()),
        (None, Emphasis()),
        ({"strength": 2}, Emphasis()),
    ],
)
def test_nothing_is_edited(options: Any, default: Policy) -> None:
    assert asked(options, default) is None


@pytest.mark.parametrize(
    ("options", "default", "said"),
    [
        ("on", Plain(), "expected 'off', or options as a JSON object"),
        ("[1]", Plain(), "expected 'off', or options as a JSON object, got list"),
        (True, Plain(), "got bool"),
        ({"alpha": "strong"}, Plain(), "alpha: expected a number"),
        ({"alpha": True}, Plain(), "alpha"),
        ({"threshold": 2.0}, Plain(), "threshold: expected a number between 0 and 1"),
        ({"threshold": 1e-9}, Plain(), "threshold: expected at least 0.001 of a request, got 1e-09"),
        ({"policy": "rebalance", "threshold": 1e-5}, Rebalance(threshold=1e-4), "expected at least 0.0001"),
        ({"strenght": 2}, Emphasis(), "unknown 'strenght'; the engine's policy is 'emphasis'"),
        ({"strength": 2}, Rebalance(), "name another with policy"),
        ({"policy": "louder"}, Plain(), "expected one of compose, emphasis"),
        ({"policy": "off", "alpha": 1}, Plain(), "'off' takes no other options"),
        ({"policy": "rebalance", "source_layer": 9}, Plain(), "source_layer: the model's layers are 0 to 3"),
        ({"spans": [[0, 21]]}, Plain(), "expected tokens of the prompt, which has 20"),
        ({"spans": [[3, 3]]}, Plain(), "spans[0].end: expected a slot above start"),
        ({"spans": [[0.5, 3]]}, Plain(), "spans[0].start: expected an integer"),
        ({"spans": ["ab"]}, Plain(), "spans[0]: expected [start, end]"),
        ({"spans": "0:3"}, Plain(), "spans: expected a list"),
        ({"spans": [[0, 1]] * 5000}, Plain(), "expected at most 4096"),
        ({"spans": [[0, 1]], "policy": "rebalance"}, Plain(), "takes none; name one that does"),
        ({"spans": [[0, 1]], "tokens": "other"}, Plain(), "the spans were made for other tokens"),
        ({"policy": "emphasis", "heads": "/etc/passwd"}, Plain(), "a request names no file"),
        ({"policy": "learned_gains", "path": "gains"}, Plain(), "a request names no file"),
        (
            {"policy": "compose", "policies": [{"policy": "sinks", "heads": "x.json"}, {"policy": "rebalance"}]},
            Plain(),
            "a request names no file",
        ),
        (
            {"policy": "compose", "policies": [{"policy": "rebalance"}, {"policy": "rebalance", "alpha": 1}]},
            Plain(),
            "two of the composed policies strengthen entries of layer 1",
        ),
    ],
)
def test_mistakes_are_refused_in_a_sentence(options: Any, default: Policy, said: str) -> None:
    with pytest.raises(ValueError, match="attnrb: ") as caught:
        asked(options, default)
    assert said in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 40) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["policy", "spans", "alpha", "strength", "heads", "layers", "rows", "tokens", "version", "x"])


@settings(max_examples=300)
@given(st.dictionaries(names, json_values | st.sampled_from(["rebalance", "emphasis", "sinks", "compose"])))
def test_whatever_comes_is_served_or_refused(options: dict[str, Any]) -> None:
    found = None
    with contextlib.suppress(ValueError):  # of which vLLM makes an answer; anything else would be a failure of ours
        found = asked(options)
    assert found is None or Ask.from_text(found.to_text()) == found


def test_what_is_asked_travels_as_text() -> None:
    found = asked({"strength": 3, "spans": [[0, 2], [4, 6, 2.5]]})
    assert found is not None
    assert found.spans == (Span(0, 2), Span(4, 6, 2.5))
    assert found.prompt == len(PROMPT)
    assert Ask.from_text(found.to_text()) == found
    assert found.plan(SHAPE) is Ask.from_text(found.to_text()).plan(SHAPE)


def test_salts_part_what_must_not_share_keys() -> None:
    different: list[Any] = [
        {"alpha": 1.0},
        {"alpha": 0.5},
        {"alpha": 1.0, "normalize": True},
        {"spans": [[0, 2]]},
        {"spans": [[0, 3]]},
        {"spans": [[0, 2, 4.0]]},
        {"strength": 2, "spans": [[0, 2]]},
        {"policy": "sinks"},
        {"policy": "sinks"},  # the same again: what is found belongs to one text
    ]
    salts = [ask.salt() for ask in map(asked, different) if ask is not None]
    assert len(set(salts)) == len(different)
    again = [ask.salt() for ask in map(asked, different[:7]) if ask is not None]
    assert salts[:7] == again
    other_prompt = Ask.of_options({"alpha": 1.0}, Plain(), SHAPE, [1, 2])
    assert other_prompt is not None
    assert other_prompt.salt() == salts[0]


def test_the_engine_takes_a_policy_in_several_forms() -> None:
    assert engine_policy({"policy": "rebalance", "alpha": 0.3}) == Rebalance(alpha=0.3)
    assert engine_policy({"alpha": 0.3}) == Rebalance(alpha=0.3)
    assert engine_policy("emphasis(strength=3)") == Emphasis(strength=3)
    assert engine_policy("off") == engine_policy({"policy": "off"}) == Plain()
    for wrong in (3, {"alpha": "x"}, "nonsense", "missing.json", None):
        with pytest.raises(ValueError, match="additional_config"):
            engine_policy(wrong)


def test_gains_of_the_engine_keep_their_place_in_a_request() -> None:
    gains = LearnedGains(SHAPE, Rebalance(alpha=0.4))
    assert policy_of(asked(None, gains)).to_dict() == gains.to_dict()


def test_which_requests_have_their_markup_read() -> None:
    assert wants_spans({}, Emphasis())
    assert wants_spans({"strength": 3}, Plain())
    assert wants_spans({"policy": "emphasis"}, Rebalance())
    assert wants_spans({}, Compose(Emphasis(), Rebalance()))
    assert not wants_spans({"alpha": 1.0}, Plain())
    assert not wants_spans({}, Rebalance())


def test_marked_prompts_become_requests() -> None:
    from text_tokenizers import byte_level

    tokenizer = byte_level()
    marked = attnrb.mark(tokenizer, ["((One)) two", "some longer text and ((a span:2.5))"], return_tensors=None)
    short, long = requests_of(marked, strength=4)
    alone = attnrb.mark(tokenizer, "((One)) two", return_tensors=None)
    assert short.prompt == {"prompt_token_ids": list(alone.inputs["input_ids"])}
    assert short.options["strength"] == 4
    assert [tuple(each) for each in short.options["spans"]] == [(each.start, each.end) for each in alone.spans[0]]
    assert long.options["spans"][0][2] == 2.5
    assert long.options["tokens"] == digest(long.tokens)
    for each in (short, long):
        ask = Ask.of_options(each.extra_args["attnrb"], Emphasis(), SHAPE, each.tokens)
        assert ask is not None
        assert ask.spans
    named = requests_of(marked, Emphasis(rows="all"))[0]
    assert named.options["policy"] == "emphasis"
    with pytest.raises(TypeError, match="expected it alone"):
        requests_of(marked, Emphasis(), strength=3)
    with pytest.raises(TypeError, match=r"attnrb\.mark"):
        requests_of("text")  # type: ignore[arg-type]
