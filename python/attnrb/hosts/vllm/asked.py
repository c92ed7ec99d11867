"""What is asked for: by the engine's options for all requests, and by each request for itself.

Nothing here knows vLLM. An engine is given a policy (`engine_policy`). A request may bring options of its own, which
`Ask.of_options` reads and checks where the request is admitted, so that a mistake is that request's alone. What it
comes to is one line of text (`Ask.to_text`), which travels with the request to where the model runs.

Note: [Salts]
The keys of a layer above the first edited one depend on the policy, so blocks of cached keys may be shared by requests
of the same policy only. The salt of a request is a digest of everything that was asked for, spans included. A request
that edits nothing has none, and shares blocks with every other such request. A policy that keeps something of a text
from one step to the next has a salt for each request: a cached block holds keys, not what was found as they were read.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch

from attnrb.ops import functional
from attnrb.ops.visibility import Visibility
from attnrb.policies import Compose, Emphasis, LearnedEmphasis, Plain
from attnrb.policies.base import LayerPlan, LayerView, Mixture, ModelShape, Policy, Request
from attnrb.policies.parse import parse_policy
from attnrb.policies.profile import bundled_profiles
from attnrb.text.spans import Span, Spans

__all__ = ["KEY", "OFF", "Ask", "digest", "engine_policy", "policy_text", "rehearse", "wants_spans"]

KEY = "attnrb"
"""The name under which options are given: in an engine's ``additional_config`` and in a request's ``extra_args``."""

OFF = "off"
"""In place of options: the model as it is."""

_MOST_SPANS = 4096
_LEAST_THRESHOLD = 1e-3
"""Of a request's own: there are up to 1/threshold outliers in a row, for which the engine must have memory."""


def engine_policy(options: Any) -> Policy:
    """The policy of requests that do not ask for another, from an engine's options.

    Args:
        options: a mapping that `attnrb.Policy.from_dict` reads; or text as `attnrb.policies.parse` reads it:
            ``"emphasis(strength=8)"``, a file, a model's folder; or ``"off"``, for an engine whose requests are plain
            unless they ask for a policy.

    Raises:
        ValueError: it is none of these; the message says what is wrong.
    """
    try:
        if options == OFF or (isinstance(options, Mapping) and options.get("policy") == OFF and len(options) == 1):
            return Plain()
        if isinstance(options, str):
            return parse_policy(options)
        return Policy.from_dict(options)
    except (TypeError, ValueError, OSError) as error:
        raise ValueError(f"additional_config[{KEY!r}]: {error}") from error


def policy_text(policy: Policy) -> str:
    """A policy as one line of text, the same for the same options."""
    return json.dumps(policy.to_dict(), sort_keys=True)


@dataclass(frozen=True)
class Ask:
    """What one request asks for, once it is checked.

    Attributes:
        policy: as `policy_text` has it.
        spans: of its prompt, in tokens.
        prompt: how many tokens its prompt has.
        sequence: names what the policy keeps of this text; None for a policy that keeps nothing.
    """

    policy: str
    spans: tuple[Span, ...] = ()
    prompt: int = 0
    sequence: str | None = None

    @classmethod
    def of_options(cls, options: Any, default: Policy, shape: ModelShape, prompt: Sequence[int]) -> Ask | None:
        """Read and check what a request asks for.

        Args:
            options: of the request: a mapping, or text: ``"off"``, or a mapping as JSON. None: the engine's policy.
                Options of a policy, beside ``policy``, its name; ``spans``: ``[[start, end], …]`` or
                ``[[start, end, strength], …]`` in tokens of the prompt; and ``tokens``: what `digest` makes of the
                prompt that the spans were made for. Without ``policy`` they stand in place of the engine's own; where
                the engine has no policy they are those of emphasis if there are spans, else those of re-balancing.
            default: the engine's policy.
            shape: of the model.
            prompt: its tokens.

        Returns:
            None where nothing is edited.

        Raises:
            ValueError: an option is unknown, of a wrong type or out of range. The message says which.
        """
        try:
            given = _as_mapping(options)
            tokens = given.pop("tokens", None)
            policy, spans = _read(given, default)
            plan = _plan(policy_text(policy), shape)
        except (TypeError, ValueError, OSError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{KEY}: {error}") from error
        if tokens is not None and tokens != digest(prompt):
            raise ValueError(
                f"{KEY}: tokens: the spans were made for other tokens than those of the prompt as the engine reads it. "
                "Most likely the chat template was given other options here and there"
            )
        _check_thresholds(plan, _plan(policy_text(default), shape))
        if beyond := [span for span in spans if span.end > len(prompt)]:
            raise ValueError(f"{KEY}: spans: expected tokens of the prompt, which has {len(prompt)}, got {beyond[0]}")
        if spans and not plan.wants_spans:
            raise ValueError(f"{KEY}: spans: the policy {policy.label()} takes none; name one that does, as emphasis")
        if not plan.edited or (isinstance(policy, Emphasis) and not spans):
            return None
        sequence = uuid.uuid4().hex if plan.keeps else None
        return cls(policy_text(policy), spans, len(prompt), sequence)

    def salt(self) -> str:
        """What tells this request's cached keys from others': see Note: [Salts]."""
        known = self.to_text() if self.spans or self.sequence else self.policy
        return f"{KEY}:" + hashlib.sha256(known.encode()).hexdigest()

    def to_text(self) -> str:
        """One line that `from_text` reads."""
        spans = [[span.start, span.end, span.strength] for span in self.spans]
        return json.dumps([self.policy, spans, self.prompt, self.sequence])

    @classmethod
    def from_text(cls, text: str) -> Ask:
        """What `to_text` gave."""
        policy, spans, prompt, sequence = json.loads(text)
        return cls(policy, tuple(Span(*each) for each in spans), prompt, sequence)

    def plan(self, shape: ModelShape) -> LayerPlan:
        """The policy fitted to a model; the same object for the same policy and model."""
        return _plan(self.policy, shape)


@lru_cache(maxsize=256)
def _plan(text: str, shape: ModelShape) -> LayerPlan:
    plan = Policy.from_dict(json.loads(text)).resolve(shape)
    rehearse(plan)
    return plan


def _check_thresholds(plan: LayerPlan, default: LayerPlan) -> None:
    least = min([_LEAST_THRESHOLD, *default.emits.values()])
    for threshold in plan.emits.values():
        if threshold < least:
            raise ValueError(
                f"{KEY}: threshold: expected at least {least:g} of a request, got {threshold:g}: a smaller one needs "
                "memory for more outliers, which the engine's own policy may ask for"
            )


def rehearse(plan: LayerPlan) -> None:
    """Let every layer edit a text of four tokens: what a policy finds wrong only at work is found here.

    Raises:
        TypeError, ValueError: as the policy does.
    """
    shape = plan.shape
    spans = Spans(((Span(0, 1),),)) if plan.wants_spans else None
    session = plan.begin(Request(spans, torch.tensor([4], dtype=torch.int64, device="cpu")))
    query = torch.zeros(1, shape.local_heads, 4, 8, dtype=torch.float32, device="cpu")
    key = torch.zeros(1, shape.local_heads, 4, 8, dtype=torch.float32, device="cpu")
    scores = {"visibility": Visibility(query_offset=0), "scale": None, "softcap": None, "sinks": None}
    for layer in sorted(plan.required):
        view = LayerView(layer, query, key, lambda: scores)
        edit = session.edit(view) if layer in plan.edited else None
        parts = edit.parts(view) if isinstance(edit, Mixture) else [(edit, scores)]
        for each, its_scores in parts:
            found = functional.attention(query, key, key, edit=each, emit=plan.emits.get(layer), **its_scores)
        if found.outliers is not None:
            session.emitted(layer, found.outliers)


def wants_spans(options: Mapping[str, Any], default: Policy) -> bool:
    """Whether a request with these options takes spans, which it may not have brought yet.

    Raises:
        TypeError, ValueError: the options are those of no policy.
    """
    if "policy" not in options and isinstance(default, Plain):
        return set(options) <= {each.name for each in fields(Emphasis)}
    policy = _read(dict(options), default)[0]
    parts = policy.policies if isinstance(policy, Compose) else (policy,)
    return any(isinstance(part, (Emphasis, LearnedEmphasis)) for part in parts)


def digest(tokens: Sequence[int]) -> str:
    """What tells one prompt's tokens from another's."""
    return hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()


def _as_mapping(options: Any) -> dict[str, Any]:
    """Options as a mapping of its own; an empty one where there are none."""
    if options is None:
        return {}
    if isinstance(options, str):
        if options == OFF:
            return {"policy": OFF}
        try:
            options = json.loads(options)
        except ValueError:
            raise ValueError(f"expected {OFF!r}, or options as a JSON object, got {options[:80]!r}") from None
    if not isinstance(options, Mapping):
        raise TypeError(f"expected {OFF!r}, or options as a JSON object, got {type(options).__name__}")
    return dict(options)


def _read(given: dict[str, Any], default: Policy) -> tuple[Policy, tuple[Span, ...]]:
    """The policy and the spans that a request asks for."""
    if not given:
        return default, ()
    options = dict(given)
    spans = _read_spans(options.pop("spans", None))
    _refuse_files(options)
    if "policy" in options:
        if options["policy"] == OFF:
            if len(options) > 1 or spans:
                raise ValueError(f"policy: {OFF!r} takes no other options, got {', '.join(sorted(given))}")
            return Plain(), ()
        return Policy.from_dict(options), spans
    if not isinstance(default, Plain):
        known = default.to_dict()
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(
                f"unknown {', '.join(map(repr, unknown))}; the engine's policy is {known['policy']!r}, with "
                f"{', '.join(sorted(set(known) - {'policy', 'version'}))}; name another with policy"
            )
        return Policy.from_dict({**known, **options}), spans
    return Policy.from_dict({"policy": "emphasis" if spans else "rebalance", **options}), spans


def _read_spans(spans: Any) -> tuple[Span, ...]:
    if spans is None:
        return ()
    if not isinstance(spans, Sequence) or isinstance(spans, str):
        raise TypeError(f"spans: expected a list of [start, end] or [start, end, strength], got {spans!r:.80}")
    if len(spans) > _MOST_SPANS:
        raise ValueError(f"spans: expected at most {_MOST_SPANS}, got {len(spans)}")
    made = []
    for index, each in enumerate(spans):
        if not isinstance(each, Sequence) or isinstance(each, str) or len(each) not in (2, 3):
            raise TypeError(f"spans[{index}]: expected [start, end] or [start, end, strength], got {each!r:.80}")
        try:
            made.append(Span(*each))
        except (TypeError, ValueError) as error:
            raise type(error)(f"spans[{index}].{error}") from None
    return tuple(made)


def _refuse_files(options: Any) -> None:
    """A request may come from anywhere, and must not have files of this machine read."""
    if isinstance(options, Mapping):
        heads = options.get("heads")
        if "path" in options or (isinstance(heads, str) and heads not in bundled_profiles()):
            raise ValueError("a request names no file: give heads or gains themselves, or name the file to the engine")
        for each in options.values():
            _refuse_files(each)
    elif isinstance(options, (list, tuple)):
        for each in options:
            _refuse_files(each)
