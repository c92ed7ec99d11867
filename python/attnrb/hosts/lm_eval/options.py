"""The options of the model ``attnrb``, sorted by what they are for. One that is for nothing is an error."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnrb.policies import LearnedGains, Policy, Rebalance, policy_names
from attnrb.policies.parse import parse_option, parse_policy, policy_options
from attnrb.text.reading import is_number

__all__ = ["Options", "as_name", "as_written", "sort_options", "unknown_option"]

_LOADED = ("revision", "subfolder", "gguf_file", "delta", "device_map", "allow_missing")
"""Of `attnrb.models.load`, under the same names."""
_TOKENIZER = ("use_fast_tokenizer", "add_bos_token")
"""Of loading a tokenizer."""
_PLACED = ("parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder")
"""Of a model over several devices."""
_SCORED = (
    "add_bos_token",
    "backend",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_length",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)
"""Of the harness' own class, which serves them."""
_NAMES = ("revision", "subfolder", "gguf_file", "delta", "peft", "tokenizer", "pretrained")
"""Options that name something: the harness hands over a number where a name consists of digits."""
_SWITCHES = (
    "add_bos_token",
    "allow_missing",
    "enable_thinking",
    "logits_cache",
    "parallelize",
    "truncation",
    "use_fast_tokenizer",
)
_DTYPES = ("mixed_precision_dtype", "softmax_dtype")
_COUNTS = {"max_length": 1, "prefix_token_id": 0}
"""Options that are whole numbers, and the least of each: the harness takes 0 for none, and cuts by a negative one."""
_REFUSED = {
    "trust_remote_code": "code that ships with a model is never run",
    "autogptq": "AutoGPTQ's own models cannot be re-balanced",
    "gptqmodel": "GPTQModel's own models cannot be re-balanced",
    "tp_plan": "tensor parallelism has no way through the harness; load the model yourself and hand it over",
}
_OWN = (
    "pretrained",
    "policy",
    "config",
    "plain",
    "dtype",
    "device",
    "batch_size",
    "max_batch_size",
    "tokenizer",
    "peft",
)

_KNOWN = tuple(dict.fromkeys((*_OWN, *_LOADED, *_TOKENIZER, *_PLACED, *_SCORED)))


@dataclass(frozen=True)
class Options:
    """What `sort_options` makes of the options."""

    policy: Policy | None
    """What to patch the model with; None leaves it plain."""
    loading: Mapping[str, Any]
    """Arguments of `attnrb.models.load`."""
    scoring: Mapping[str, Any]
    """Arguments of the harness' own class."""


def sort_options(given: Mapping[str, Any], *, plain: bool, policy: Policy | str | None, loaded: bool) -> Options:
    """Sort the options that the model was made with.

    Args:
        given: all that have no parameter of their own; those that are None were not given.
        plain: leave the model as it is.
        policy: a whole policy, or the name of one whose options are among `given`. Default: re-balancing.
        loaded: whether the model is loaded already, so that no option of loading can count.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range, does not go with the others, or is unknown to a loaded model. What one to
            be loaded does not know, `attnrb.models.load` finds.
    """
    given = {
        name: as_name(name, value) if name in _NAMES else value for name, value in given.items() if value is not None
    }
    for name, why in _REFUSED.items():
        if given.pop(name, False):
            raise ValueError(f"{name}: {why}")
    if given.get("backend", "default") not in ("default", "causal"):
        raise ValueError(f"backend: attnrb serves decoder-only models ('causal'), got {given['backend']!r}")
    # What comes too late is told as that, whatever it holds.
    _check_types({name: each for name, each in given.items() if not loaded or name in _SCORED} | {"plain": plain})
    chosen = _policy(policy, given, plain)
    scoring = {name: given[name] for name in _SCORED if name in given}
    if loaded:
        late = sorted(name for name in given if name not in _SCORED)
        if late and late[0] in _KNOWN:
            raise ValueError(f"{late[0]}: this model is loaded already, so the option comes too late")
        if late:
            raise unknown_option(late[0])
        return Options(chosen, {}, scoring)
    tokenizer = {name.removesuffix("_tokenizer"): given[name] for name in _TOKENIZER if name in given}
    loading = {name: given[name] for name in _LOADED if name in given}
    others = {name: value for name, value in given.items() if name not in _KNOWN}
    return Options(chosen, {**loading, "tokenizer_options": tokenizer, "options": _places(given) | others}, scoring)


def as_name(name: str, value: Any) -> Any:
    """An option that names a file, a folder or a branch; loaded models and tokenizers pass.

    Raises:
        TypeError: it is a truth value.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected a name, got {value!r}")
    return str(value) if isinstance(value, (int, float)) else value


def as_written(text: str, read: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the harness' text, less freely read: names as they stand, and ``1_0`` is no number.

    Args:
        text: ``name=value`` with commas between.
        read: what the harness reads in it.
    """
    options = dict(read)
    for each in text.strip().split(","):
        name, _, value = each.partition("=")
        number = isinstance(read.get(name), (int, float)) and not isinstance(read.get(name), bool)
        if number and (name in _NAMES or not is_number(value.strip())):
            options[name] = value.strip()
    return options


def _check_types(given: Mapping[str, Any]) -> None:
    """Refuse what the harness' own class would take for something else, or end at in the words of torch."""
    for name in (*_SWITCHES, "plain"):
        value = given.get(name, False)
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
    for name, least in _COUNTS.items():
        value = given.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected a whole number of {least} or above, got {value!r}")
    for name in _DTYPES:
        value = given.get(name, torch.float32)
        dtype = getattr(torch, value, None) if isinstance(value, str) else value
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{name}: expected a dtype such as float32 or bfloat16, got {value!r}")
    if not isinstance(given.get("chat_template_args", {}), Mapping):
        raise TypeError(f"chat_template_args: expected a mapping, got {given['chat_template_args']!r}")
    end = given.get("think_end_token", "")
    if isinstance(end, bool) or not isinstance(end, (str, int)):
        raise TypeError(f"think_end_token: expected a token or its number, got {end!r}")


def unknown_option(name: str, others: Iterable[str] = ()) -> ValueError:
    """The error for an option that nothing takes.

    Args:
        name: the option.
        others: names beside our own that would have been taken, as those of the model's configuration.
    """
    own = [*_KNOWN, *policy_options(Rebalance.name)]
    elsewhere = [policy for policy in policy_names() if name in policy_options(policy)]
    close = difflib.get_close_matches(name, [*own, *others], n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"its own are {', '.join(sorted(own))}"
    if elsewhere:
        hint = f"it is one of policy={' or '.join(elsewhere)}"
    return ValueError(f"{name}: the model attnrb has no such option; {hint}")


def _policy(policy: Policy | str | None, given: dict[str, Any], plain: bool) -> Policy | None:
    """The policy that the options name, None for the plain model; its own options are taken out of `given`."""
    if policy is not None and not isinstance(policy, (Policy, str)):
        raise TypeError(f"policy: expected an attnrb.Policy or text, got {type(policy).__name__}")
    named = policy if isinstance(policy, str) and policy in policy_names() else None
    own = {name: given.pop(name) for name in policy_options(named or Rebalance.name) if name in given}
    if own and (plain or (policy is not None and named is None)):
        which = "plain leaves the model as it is" if plain else "a whole policy stands in place of single options"
        raise ValueError(f"{next(iter(own))}: {which}, so the option would not count")
    if plain and policy is not None:
        raise ValueError("policy: plain leaves the model as it is, so the policy would not count")
    if plain:
        return None
    if isinstance(policy, Policy):
        return policy
    if policy is not None and named is None:
        return parse_policy(policy)
    path = own.get("gains")
    if named is None and isinstance(path, (str, os.PathLike)) and not _is_list(str(path)):
        if len(own) > 1:
            raise ValueError(f"{next(name for name in own if name != 'gains')}: learnt gains bring their own options")
        if not Path(path).exists():
            raise ValueError(f"gains: expected numbers like 0.1+0.2 or a file of learnt gains, got {str(path)!r}")
        return LearnedGains.load(path)
    return Policy.from_dict({"policy": named or Rebalance.name} | {name: _value(name, own[name]) for name in own})


def _value(name: str, value: Any) -> Any:
    """An option's value; the harness hands over text and whole numbers as they were written."""
    written = isinstance(value, str) or (isinstance(value, (int, float)) and not isinstance(value, bool))
    return parse_option(name, str(value)) if written else value


def _is_list(text: str) -> bool:
    """Whether a text is numbers joined by plus signs."""
    try:
        return bool([float(part) for part in text.split("+")])
    except ValueError:
        return False


def _places(given: Mapping[str, Any]) -> dict[str, Any]:
    """Where ``from_pretrained`` puts a model over several devices."""
    stated = [name for name in _PLACED[1:] if name in given]
    if not given.get("parallelize", False):
        if stated:
            raise ValueError(f"{stated[0]}: it counts with parallelize=True alone")
        return {}
    memory: dict[Any, Any] = {}
    if "max_memory_per_gpu" in given:
        memory |= dict.fromkeys(range(torch.cuda.device_count()), given["max_memory_per_gpu"])
    if "max_cpu_memory" in given:
        memory["cpu"] = given["max_cpu_memory"]
    return {
        "device_map": "auto",
        "max_memory": memory or None,
        "offload_folder": given.get("offload_folder", "./offload"),
    }
