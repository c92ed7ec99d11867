"""Options that several commands share, each declared once."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnrb.policies.parse import parse_layers

if TYPE_CHECKING:
    from attnrb.policies.rebalance import RebalanceConfig

_METHOD = "Re-balancing"
_GENERATION = "Generation"
_RUN = "Model and run"

Prompt = Annotated[str | None, typer.Argument(help="The text to go on from; - reads it from standard input.")]

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Hub id, folder or .gguf file. Default: the embedded SmolLM2-135M-Instruct.",
        show_default=False,
        rich_help_panel=_RUN,
    ),
]
DType = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto (as the checkpoint was saved).", rich_help_panel=_RUN)
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads to compute with.", show_default="all cores", rich_help_panel=_RUN),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.", rich_help_panel=_RUN)]

Alpha = Annotated[float, typer.Option(help="Strength: the gain at layer 0.", rich_help_panel=_METHOD)]
Threshold = Annotated[
    float, typer.Option(help="Attention above which an entry is an outlier.", rich_help_panel=_METHOD)
]
SourceLayer = Annotated[int, typer.Option(help="Layer whose outliers are taken.", rich_help_panel=_METHOD)]
Depth = Annotated[
    float | None,
    typer.Option(help="Layer at which the gain reaches 0.", show_default="the last layer", rich_help_panel=_METHOD),
]
Layers = Annotated[
    str | None,
    typer.Option(
        help="Layers to re-balance, like 1-12,15.", show_default="all after the source layer", rich_help_panel=_METHOD
    ),
]
Normalize = Annotated[
    bool, typer.Option("--normalize", help="Divide each row by its new sum.", rich_help_panel=_METHOD)
]
BoostAll = Annotated[
    bool, typer.Option("--boost-all", help="Strengthen every entry, not only outliers.", rich_help_panel=_METHOD)
]

MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", help="At most so many new tokens.", rich_help_panel=_GENERATION)
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


@dataclass(frozen=True)
class Method:
    """The re-balancing options as they were given."""

    alpha: float
    threshold: float
    source_layer: int
    depth: float | None
    layers: str | None
    normalize: bool
    boost_all: bool

    def config(self) -> RebalanceConfig:
        """The configuration they mean. Raises ValueError for one that is out of range."""
        from attnrb.policies.rebalance import RebalanceConfig

        return RebalanceConfig(
            alpha=self.alpha,
            threshold=self.threshold,
            source_layer=self.source_layer,
            depth=self.depth,
            layers=None if self.layers is None else tuple(parse_layers(self.layers)),
            normalize=self.normalize,
            boost_all=self.boost_all,
        )


def parse_config(text: str) -> RebalanceConfig:
    """A configuration: ``default``, ``alpha=0.3,normalize=true``, a JSON object, a file of one, or a model's folder.

    In a list of options, layers and heads are joined by plus signs: ``layers=1-12+15``.

    Raises:
        ValueError: it is none of these, cannot be read, or an option is unknown or out of range.
        TypeError: an option has the wrong type.
    """
    import json
    from pathlib import Path

    from attnrb.policies.rebalance import RebalanceConfig

    if text == "default":
        return RebalanceConfig()
    written_out = text.lstrip().startswith("{")
    try:
        if not written_out and Path(text).is_dir():
            return RebalanceConfig.from_pretrained(text)
        if written_out or text.endswith(".json"):
            return RebalanceConfig.from_dict(json.loads(text if written_out else Path(text).read_text("utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"config: {text!r} is no JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"config: {text!r} could not be read: {error.strerror or error}") from error
    options: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"config: expected default, name=value,..., a JSON object or a .json file, got {text!r}")
        options[name.strip()] = _option(name.strip(), value.strip())
    return RebalanceConfig.from_dict(options)


def _option(name: str, value: str) -> Any:
    if name in ("layers", "heads"):
        return parse_layers(value.replace("+", ","))
    if name == "gains":
        return [_option("", gain) for gain in value.split("+")]
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value
