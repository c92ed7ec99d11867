"""What every command has in common: examples in its help, options from a file, and ``--json`` with or without a file.

Note: [Options from a file]
``--config FILE.yaml`` stands for the options that the file names, as if they were written where it stands, and an
option that is given on the command line too counts there alone. The file is a mapping of options by their names, with
``-`` or ``_`` inside. A list gives an option several times, or several words with commas between where the option takes
those; a mapping under ``set`` gives one ``name=value`` for each entry. Numbers count as they are written: YAML itself
would read 010 as 8, 1_000 as 1000 and the branch 1.10 as 1.1.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from attnrb.cli.console import user_errors
from attnrb.text.reading import is_number, is_whole_number

__all__ = ["Command", "add", "shown"]

_ENDINGS = (".yaml", ".yml")
_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="A .yaml file of this command's options by name; those given here count before those.",
            show_default=False,
            rich_help_panel="Model and run",
        ),
    ],
)


def add(
    app: typer.Typer,
    function: Callable[..., None],
    name: str | None = None,
    *,
    examples: Sequence[str] = (),
    **settings: Any,
) -> None:
    """Give the program a command.

    Args:
        app: the program, or a group of commands in it.
        function: the command. Where it has no ``config`` of its own, it gets ``--config FILE.yaml``.
        name: default: that of the function.
        examples: commands for the end of its help.
        settings: of ``typer.Typer.command``.
    """
    app.command(name, cls=Command, epilog=shown(examples), **settings)(_with_config(function))


def shown(examples: Sequence[str]) -> str | None:
    """Examples as the end of a help."""
    if not examples:
        return None
    # Brackets are markup there.
    return "\n\n".join(["Examples:", *(f"  {each}".replace("[", r"\[") for each in examples)])


def _with_config(function: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(function, eval_str=True)
    if "config" in signature.parameters:
        return function
    parameters = list(signature.parameters.values())
    keyword = [each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    first = [each for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY]

    @functools.wraps(function)
    def run(*args: Any, config: str | None = None, **given: Any) -> None:
        if config is not None:  # a .yaml file has become options by now
            with user_errors():
                raise ValueError(f"config: expected a .yaml file of options, got {config!r}")
        function(*args, **given)

    del run.__wrapped__
    made = [*first, *keyword, _CONFIG]
    run.__signature__ = signature.replace(parameters=made)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in made}
    return run


class Command(TyperCommand):
    """A command that reads its options from a file too, and takes a bare ``--json`` for ``--json -``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See the class."""
        with user_errors():
            args = self._with_files(ctx, list(_bare_json(args, self.get_params(ctx))))
        self._check_numbers(ctx, args)
        return super().parse_args(ctx, args)

    def _check_numbers(self, ctx: Any, args: list[str]) -> None:
        """Refuse what is no number as `attnrb.text.reading.is_number` has it, in a parser's words and with its code."""
        if ctx.resilient_parsing:  # of words that are being completed
            return
        kinds = _number_options(self.callback)
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        params: list[Any] = self.get_params(ctx)
        for param in params:
            value = given.get(param.name)
            kind = kinds.get(param.name)
            if kind is None or not isinstance(value, str):
                continue
            if not (is_whole_number(value) if kind is int else is_number(value)):
                what = "integer" if kind is int else "number"
                raise typer.BadParameter(f"{value!r} is not a valid {what}.", ctx=ctx, param=param)

    def _with_files(self, ctx: Any, args: list[str]) -> list[str]:
        names, rest, waiting = [], [], iter(args)
        for each in waiting:
            option, equals, value = each.partition("=")
            if each == "--":
                rest += [each, *waiting]
            elif option not in ("--config", "-c"):
                rest.append(each)
            elif (value := value if equals else next(waiting, "")).endswith(_ENDINGS):
                names.append(value)
            else:
                rest += [each] if equals else [each, value]
        if not names:
            return args
        params = self.get_params(ctx)
        given = {each.partition("=")[0] for each in rest if each.startswith("-")}
        options, words = [], []
        for name in names:
            for param, values in _read(Path(name), params):
                if param.param_type_name == "argument":
                    words += values
                elif not given & {*param.opts, *param.secondary_opts}:
                    options += values
        # What a person types after the options of a file is the command's argument in place of the file's.
        return [*options, *rest, *(words if not _has_words(rest, params) else [])]


def _number_options(command: Any) -> dict[str, type]:
    """The options of a command that are numbers, and which kind."""
    found = {}
    for name, each in inspect.signature(command, eval_str=True).parameters.items():
        kind = get_args(each.annotation)[0] if get_args(each.annotation) else each.annotation
        named = {kind, *get_args(kind)} & {int, float}
        if named:
            found[name] = named.pop()
    return found


def _bare_json(args: Sequence[str], params: Sequence[Any]) -> Iterator[str]:
    """``--json`` at the end, or before another option, prints: it is ``--json -``."""
    takes_file = any("--json" in each.opts and not getattr(each, "is_flag", False) for each in params)
    for place, each in enumerate(args):
        yield each
        if each == "--json" and takes_file:
            after = args[place + 1] if place + 1 < len(args) else "--"
            if after.startswith("-") and after != "-":
                yield "-"


def _has_words(args: Iterable[str], params: Sequence[Any]) -> bool:
    """Whether there is an argument that is no option and no value of one."""
    flags = {
        name for each in params if getattr(each, "is_flag", False) for name in (*each.opts, *each.secondary_opts)
    } | {"--help", "-h"}
    waiting = iter(args)
    for each in waiting:
        if each == "--":
            return next(waiting, None) is not None
        if not each.startswith("-") or each == "-":
            return True
        if "=" not in each and each not in flags:
            next(waiting, None)
    return False


def _read(path: Path, params: Sequence[Any]) -> Iterator[tuple[Any, list[str]]]:
    """The options that a file names, each with what stands for it on a command line.

    Raises:
        ValueError: the file cannot be read, is no mapping, or names an option that the command has not.
    """
    import yaml

    try:
        found = _as_written(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"config: {str(path)!r} could not be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config: {str(path)!r} is not YAML: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(f"config: {str(path)!r} has no options by name, such as `limit: 100`")
    known = {_plain(opt): each for each in params for opt in (each.name, *each.opts) if opt}
    known.pop("config", None)
    for key, value in found.items():
        param = known.get(_plain(str(key)))
        if param is None:
            close = difflib.get_close_matches(_plain(str(key)), known, n=2)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"config: {path.name} names {key!r}, which is no option of this command{hint}")
        yield param, _written(param, value, f"config: {path.name}: {key}")


def _as_written(text: str) -> Any:
    """A YAML document whose numbers and dates are text; a key that stands twice is an error.

    Raises:
        yaml.YAMLError: it is none.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key.value, str) and key.value != "<<"]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise yaml.YAMLError(f"the key {twice!r} stands in it twice")
            found: dict[Any, Any] = super().construct_mapping(node, deep)
            return found

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":int", ":float", ":timestamp"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return yaml.load(text, Loader)


def _plain(name: str) -> str:
    return name.strip("-").strip("_").replace("_", "-")


def _written(param: Any, value: Any, where: str) -> list[str]:
    """One option as a command line has it."""
    if value is None:
        return []
    if getattr(param, "is_flag", False):
        if not isinstance(value, bool):
            raise ValueError(f"{where}: expected true or false, got {value}")
        if value:
            return [param.opts[0]]
        return [param.secondary_opts[0]] if param.secondary_opts else []
    if isinstance(value, dict):
        value = [f"{name}={_option_text(each)}" for name, each in value.items()]
    values = value if isinstance(value, list) else [value]
    texts = [_text(each) for each in values]
    if not getattr(param, "multiple", False):
        texts = [",".join(texts)]
    if param.param_type_name == "argument":
        return texts
    return [f"{param.opts[0]}={text}" if param.opts[0].startswith("--") else text for text in texts]


def _option_text(value: Any) -> str:
    """The value of a policy's option: a list or a mapping as JSON, anything else as it is written."""
    return _json(value) if isinstance(value, (list, dict)) else _text(value)


def _json(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_json, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(str(key))}: {_json(each)}' for key, each in value.items())}}}"
    if isinstance(value, str) and is_number(value):
        value = int(value) if is_whole_number(value) else float(value)
    return json.dumps(value)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
