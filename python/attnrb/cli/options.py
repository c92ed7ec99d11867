"""Options that several commands share, each declared once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from attnrb.policies import Policy, Rebalance, policy_names
from attnrb.policies.base import short_text

_METHOD = "Re-balancing"
_POLICIES = "Policy"
_GENERATION = "Generation"

Prompt = Annotated[str | None, typer.Argument(help="The prompt; - reads it from standard input.")]

MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", help="How many new tokens at most.", rich_help_panel=_GENERATION)
]
Temperature = Annotated[
    float, typer.Option(help="0 takes the likeliest token; above 0 samples.", rich_help_panel=_GENERATION)
]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.", rich_help_panel=_GENERATION)]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Wrap the prompt in the model's chat template.",
        show_default="if it has one",
        rich_help_panel=_GENERATION,
    ),
]
Markup = Annotated[
    bool,
    typer.Option(
        "--markup/--no-markup",
        help="Read ((…)) in the prompt as what to emphasise; --no-markup takes it literally.",
        rich_help_panel=_GENERATION,
    ),
]


@dataclass(frozen=True)
class PolicyChoice:
    """The options that name a policy, as they were given."""

    name: str | None
    settings: tuple[str, ...]
    rebalancing: dict[str, Any]

    @property
    def given(self) -> bool:
        """Whether any of them was."""
        return bool(self.name or self.settings or self.rebalancing)

    def chosen(self) -> Policy | None:
        """The policy they mean, as `policy` has it; None where none was given."""
        return self.policy() if self.given else None

    def policy(self) -> Policy:
        """The policy they mean.

        Raises:
            ValueError: it is unknown, or an option is unknown or out of range.
            TypeError: an option has the wrong type.
        """
        from attnrb.policies.parse import make_policy, parse_option, parse_policy

        name = self.name or Rebalance.name
        if self.rebalancing and name not in (Rebalance.name, "default"):
            flag = "--" + next(iter(self.rebalancing)).replace("_", "-")
            raise ValueError(f"{flag}: an option of re-balancing, which --policy {name} does not have; use --set")
        if name not in policy_names():
            if self.settings or self.rebalancing:
                known = ", ".join(policy_names())
                raise ValueError(f"policy: expected one of {known} where options stand beside it, got {name!r}")
            return parse_policy(name)
        made = make_policy(name, self.settings)
        if not self.rebalancing:
            return made
        flags = {
            key: parse_option(key, value) if isinstance(value, str) else value
            for key, value in self.rebalancing.items()
        }
        return Policy.from_dict({**made.to_dict(), **flags})


def takes_policy(command: Callable[..., None], *, rebalancing: bool = True) -> Callable[..., None]:
    """Give a command the options that name a policy; it gets them as its argument ``policy``, a `PolicyChoice`.

    They are ``--policy`` and ``--set``, which any policy has, and with ``rebalancing`` a flag for each option of
    re-balancing, made from the fields of `attnrb.Rebalance`.
    """
    signature = inspect.signature(command, eval_str=True)
    flags = _rebalancing_flags() if rebalancing else []
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += [_POLICY, _SET, *flags] if parameter.name == "policy" else [parameter]

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> None:
        name, settings = given.pop("policy"), tuple(given.pop("set_") or ())
        found = {flag.name: given.pop(flag.name) for flag in flags}
        # A flag that was not given leaves the option at its default, or at what --set says.
        named = {key: value for key, value in found.items() if value is not None and value is not False}
        command(*args, **given, policy=PolicyChoice(name, settings, named))

    del run.__wrapped__
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def takes_any_policy(command: Callable[..., None]) -> Callable[..., None]:
    """As `takes_policy`, without the flags of re-balancing, for a command whose own options have their names."""
    return takes_policy(command, rebalancing=False)


_KINDS: dict[str, Any] = {"bool": bool, "float": float | None, "float | None": float | None, "int": int | None}


def _rebalancing_flags() -> list[inspect.Parameter]:
    """A parameter for each option of re-balancing; one that is not given is None, or False."""
    flags = []
    for each in fields(Rebalance):
        kind = _KINDS.get(str(each.type), str | None)
        described = typer.Option(
            "--" + each.name.replace("_", "-"),
            help=each.metadata["help"],
            show_default=kind is not bool and (each.metadata["default"] or short_text(each.default)),
            rich_help_panel=_METHOD,
        )
        flags.append(
            inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if kind is bool else None,
                annotation=Annotated[kind, described],
            )
        )
    return flags


_POLICY = inspect.Parameter(
    "policy",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        typer.Option(
            "--policy",
            "-p",
            help=f"What to edit: {', '.join(policy_names())}; or a policy's file or folder.",
            show_default=Rebalance.name,
            rich_help_panel=_POLICIES,
            autocompletion=lambda incomplete: [each for each in policy_names() if each.startswith(incomplete)],
        ),
    ],
)
_SET = inspect.Parameter(
    "set_",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="An option of the policy, as name=value. May be given again.",
            show_default=False,
            rich_help_panel=_POLICIES,
        ),
    ],
)
