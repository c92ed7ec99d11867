"""Policies as people write them: in one line of text, or as a name and options on a command line.

========================================  =================================================================
text                                      policy
========================================  =================================================================
``default``                               `attnrb.Rebalance` with its defaults
``alpha=0.3,normalize=true``              `attnrb.Rebalance` with these options
``emphasis``                              the policy of this name, with its defaults
``emphasis(strength=8,rows=all)``         the same, with these options
``{"policy": "emphasis", ...}``           what `attnrb.Policy.to_dict` gives
``policy.json``, ``model/``, ``gains/``   a file of that, a folder of `save_pretrained`, learnt gains
========================================  =================================================================
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from attnrb.policies.base import Policy, policy_class, policy_names
from attnrb.policies.checks import read_ranges
from attnrb.policies.learnable import learned_file, load_learned
from attnrb.policies.profile import bundled_profiles
from attnrb.policies.rebalance import Rebalance
from attnrb.text.reading import is_number, is_whole_number, parse_json, read_text

__all__ = ["make_policy", "parse_layers", "parse_option", "parse_policy", "policy_options"]


def parse_policy(text: str) -> Policy:
    """A policy: see the table of this module. In a list of options, layers and heads are joined by plus signs.

    Raises:
        ValueError: it is none of these, cannot be read, or an option is unknown or out of range.
        TypeError: an option has the wrong type.
    """
    text = text.strip()
    if text == "default":
        return Rebalance()
    if text in policy_names():
        return make_policy(text, ())
    call = re.fullmatch(r"([A-Za-z_]\w*)\((.*)\)", text, re.DOTALL)
    if call is not None:
        return make_policy(call[1], _split(call[2]))
    if text.startswith("{") or text.endswith(".json"):
        return _from_json(text)
    if (file := learned_file(text)) is not None:
        return load_learned(file)
    if Path(text).is_dir():
        return Policy.from_pretrained(text)
    if "=" not in text:
        raise ValueError(
            f"config: expected default, name=value,..., one of {', '.join(policy_names())}, a JSON object, a .json "
            f"file or a folder, got {text!r}"
        )
    return make_policy("rebalance", _split(text))


def make_policy(name: str, options: Iterable[str]) -> Policy:
    """The policy of this name with options ``key=value``.

    Raises:
        ValueError: there is no such policy, or an option is unknown, given twice or out of range.
        TypeError: an option has the wrong type.
    """
    kind = policy_class(name)
    found: dict[str, Any] = {}
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals or not key:
            raise ValueError(f"config: expected name=value, got {option!r}")
        if key in found:
            raise ValueError(f"config: expected {key} once, got it twice")
        found[key] = parse_option(key, value)
    return kind.from_dict({"policy": name, **found})


def policy_options(name: str) -> tuple[str, ...]:
    """The names of a policy's options.

    Raises:
        ValueError: there is no such policy.
    """
    kind = policy_class(name)
    return tuple(each.name for each in fields(kind)) if is_dataclass(kind) else ("path",)


def _split(text: str) -> list[str]:
    """Options at the commas that are not within brackets or quotes."""
    return [part for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"|[^,])+", text) if part.strip()]


def _from_json(text: str) -> Policy:
    written = text
    if not text.startswith("{"):
        try:
            written = read_text(Path(text))
        except ValueError as error:
            raise ValueError(f"config: {error}") from error
    try:
        read = parse_json(written)
    except ValueError as error:
        raise ValueError(f"config: {text!r:.200} is not JSON: {error}") from error
    return Policy.from_dict(read)


def parse_option(name: str, value: str) -> Any:
    """The value of one option: JSON, a number, true, false or none, or a list joined by plus signs; else text."""
    if value.startswith(("{", "[", '"')):
        with contextlib.suppress(ValueError):
            return parse_json(value)
    if value.lower() in ("none", "null"):
        return None
    if name in ("layers", "heads"):
        return read_ranges(name, value) if re.fullmatch(r"[0-9\s,+-]+", value) else _layers_or_text(name, value)
    if name == "gains":
        return [parse_option("", gain) for gain in value.split("+")]
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if is_whole_number(value):
        return int(value)
    return float(value) if is_number(value) else value


def _layers_or_text(name: str, value: str) -> Any:
    """Where something else than layers stands: the name of a file, or a mistake that names what was expected."""
    return value if Path(value).suffix == ".json" or value in bundled_profiles() else read_ranges(name, value)


def parse_layers(text: str, name: str = "layers") -> list[int]:
    """Numbers of a list like ``1-12,15``, ascending. Raises ValueError, naming the option, for anything else."""
    return read_ranges(name, text)
