"""How commands load a model: the options that say which and where, threads first, transformers kept quiet."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import typer

from attnrb.cli.console import quiet_transformers
from attnrb.models.options import LoadOptions

__all__ = ["PANEL", "Loading", "Model", "Threads", "load_model", "set_threads", "takes_model"]

PANEL = "Model and run"


@dataclass(frozen=True)
class Loading:
    """The options of loading a model, as they were given."""

    options: LoadOptions
    threads: int | None

    def on(self, device: str | None) -> Loading:
        """The same on a device that a launcher gave this process, unless the options name one; None: the same."""
        if device is None or self.options.device != "auto" or self.options.device_map is not None:
            return self
        return replace(self, options=replace(self.options, device=device))


def takes_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of loading a model; it gets them as its argument ``loading``, a `Loading`.

    They are made from the fields of `attnrb.models.LoadOptions`, and ``--threads``.
    """
    signature = inspect.signature(command, eval_str=True)
    made = [_parameter(each) for each in fields(LoadOptions)]
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += [*made, _THREADS] if parameter.name == "loading" else [parameter]

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> None:
        options = LoadOptions(**{each.name: given.pop(each.name) for each in fields(LoadOptions)})
        loading = Loading(options, given.pop("threads"))
        command(*args, **given, loading=loading)

    del run.__wrapped__
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _parameter(each: Any) -> inspect.Parameter:
    flag = "--" + each.name.replace("_", "-")
    described = typer.Option(
        *([flag, "-m"] if each.name == "model" else [flag]),
        help=each.metadata["help"],
        show_default=each.metadata["default"] or not isinstance(each.default, bool),
        rich_help_panel=PANEL,
        autocompletion=_COMPLETIONS.get(each.name),
    )
    kind = {"bool": bool, "str": str}.get(str(each.type), str | None)
    return inspect.Parameter(
        each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=Annotated[kind, described]
    )


def _completion(*values: str) -> Callable[[str], list[str]]:
    return lambda incomplete: [each for each in values if each.startswith(incomplete)]


_COMPLETIONS: dict[str, Callable[[str], list[str]]] = {
    "dtype": _completion("float32", "bfloat16", "float16", "auto"),
    "device": _completion("auto", "cpu", "cuda", "cuda:0", "cuda:1", "mps", "xpu"),
    "device_map": _completion("auto", "balanced", "sequential"),
}
Model = _parameter(next(each for each in fields(LoadOptions) if each.name == "model")).annotation
"""``--model``, for a program that loads the model by itself."""
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Threads to compute with.", show_default="all cores", rich_help_panel=PANEL),
]
_THREADS = inspect.Parameter("threads", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Threads)


def set_threads(threads: int | None) -> None:
    """Compute with this many threads; None leaves the default."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def load_model(loading: Loading, step: Callable[[str], None], model: str | None = None) -> tuple[Any, Any]:
    """The model and tokenizer that the options name; ``model`` stands in place of ``--model``."""
    loading.options.check()
    step("Starting")
    from attnrb.models import load

    set_threads(loading.threads)
    quiet_transformers()
    return load(model or loading.options.model, progress=step, **loading.options.arguments())


def run_facts(loaded: Any, loading: Loading, temperature: float, seed: int) -> dict[str, Any]:
    """What a result depends on beside the prompt and the method."""
    import torch

    from attnrb import __version__

    return {
        "attnrb": __version__,
        "model": loading.options.name,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "temperature": temperature,
        "seed": seed,
    }
