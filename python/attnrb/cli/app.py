"""The commands of ``attnrb``: read options, call the library, print. `attnrb.cli.render` draws what they print."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from attnrb.cli import eval as eval_commands
from attnrb.cli import options, render
from attnrb.cli.analyze import analyze
from attnrb.cli.console import OneSentence, output, print_json, steps, user_errors
from attnrb.cli.files import standard_input
from attnrb.cli.loading import load_model, set_threads
from attnrb.cli.profile import demo, profile
from attnrb.cli.search import search
from attnrb.cli.serve import serve
from attnrb.cli.study import app as study_app
from attnrb.reports.printable import printable

app = typer.Typer(
    help="Rewrite the attention of a language model while it runs.",
    cls=OneSentence,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        from attnrb import __version__

        typer.echo(f"attnrb {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Rewrite the attention of a language model while it runs: re-balancing, and emphasis on what you mark."""


@app.command()
@options.takes_policy
def compare(
    *,
    prompt: options.Prompt = None,
    model: options.Model = None,
    dtype: options.DType = "float32",
    threads: options.Threads = None,
    allow_missing: options.AllowMissing = False,
    json: options.Json = False,
    policy: options.PolicyChoice,
    max_new_tokens: options.MaxNewTokens = 64,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    chat: options.Chat = None,
    markup: options.Markup = True,
) -> None:
    """Generate from one prompt without and with re-balancing, or with emphasis on what ((…)) marks, side by side."""
    with user_errors(), steps() as step:
        chosen = policy.chosen()
        text = _prompt(prompt)
        loaded, tokenizer = load_model(model, dtype, threads, step, allow_missing=allow_missing)
        from attnrb.studies.compare import DEFAULT_PROMPT
        from attnrb.studies.compare import compare as run

        comparison = run(
            loaded,
            tokenizer,
            DEFAULT_PROMPT if text is None else text,
            chosen,
            chat=chat,
            markup=markup,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            progress=step,
        )
    about = _about(loaded, model, temperature, seed)
    if json:
        print_json({**about, **comparison.to_dict()})
    else:
        render.comparison(output(), comparison, tokenizer, about)


@app.command()
@options.takes_policy
def generate(
    *,
    prompt: options.Prompt = None,
    plain: Annotated[bool, typer.Option("--plain", help="Without re-balancing: the model as it is.")] = False,
    model: options.Model = None,
    dtype: options.DType = "float32",
    threads: options.Threads = None,
    allow_missing: options.AllowMissing = False,
    json: options.Json = False,
    policy: options.PolicyChoice,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    chat: options.Chat = None,
    markup: options.Markup = True,
) -> None:
    """Generate from one prompt, with re-balancing or emphasis on what ((…)) marks (or --plain, without)."""
    with user_errors():
        chosen = policy.chosen()
        text = _prompt(prompt)
        with steps() as step:
            loaded, tokenizer = load_model(model, dtype, threads, step, allow_missing=allow_missing)
        from attnrb.studies.compare import DEFAULT_PROMPT
        from attnrb.studies.generation import generate as run
        from attnrb.studies.prompts import read_prompt

        text = DEFAULT_PROMPT if text is None else text
        output()  # makes stdout replace what it cannot encode

        def show(piece: str) -> None:
            sys.stdout.write(printable(piece))
            sys.stdout.flush()

        read = read_prompt(loaded, tokenizer, text, chosen, chat=chat, markup=markup)

        def go() -> Any:
            return run(
                loaded,
                tokenizer,
                read.input_ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                on_text=None if json else show,
            )

        if plain:
            generation, stats = go(), None
        else:
            with read.patch(loaded) as patched:
                generation = go()
            stats = patched.stats
    if json:
        print_json(
            {
                **_about(loaded, model, temperature, seed),
                "prompt": text,
                "config": None if plain else read.policy.to_dict(),
                "spans": None if read.spans is None else read.spans.to_dict()["rows"][0],
                **generation.to_dict(),
                "outliers_per_row": None if stats is None else stats.outliers_per_row,
                "rebalanced_layers": 0 if stats is None else stats.layers,
            }
        )
    else:
        sys.stdout.write("\n")
        sys.stdout.flush()
        render.generation(generation, stats, read.spans)


app.command()(analyze)
app.command("eval")(eval_commands.evaluate)
app.command()(search)
app.add_typer(study_app, name="study")
app.command()(profile)
app.command()(demo)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
app.command(
    "lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(eval_commands.lm_eval)


@app.command()
def info(
    json: options.Json = False,
    report: Annotated[
        bool, typer.Option("--report", help="Print Markdown to paste into an issue: no path, name or token in it.")
    ] = False,
) -> None:
    """Print versions, the instruction set in use, threads and build options."""
    if json and report:
        raise typer.BadParameter("--json and --report exclude each other")
    with user_errors():
        if report:
            from attnrb.cli.report import report as report_text

            typer.echo(report_text())
            return
        from attnrb.cli.about import about

        facts = about()
    if json:
        print_json(facts)
    else:
        render.facts(output(), facts)


@app.command()
@options.takes_policy
def bench(
    *,
    policy: options.PolicyChoice,
    threads: options.Threads = None,
    dtype: options.DType = "float32",
    length: Annotated[int, typer.Option(min=16, help="Tokens in the sequence.")] = 1024,
    json: options.Json = False,
) -> None:
    """Time re-balanced attention against PyTorch's on this machine, after checking its results."""
    with user_errors(), steps() as step:
        step("Starting")
        from attnrb.cli.selfbench import run
        from attnrb.models import resolve_dtype

        chosen = policy.policy() if policy.given else None
        set_threads(threads)
        report = run(length=length, dtype=resolve_dtype(dtype), policy=chosen, progress=step)
    if json:
        print_json(report.to_dict())
    else:
        render.bench(output(), report)


def _prompt(prompt: str | None) -> str | None:
    return standard_input().strip() if prompt == "-" else prompt


def _about(loaded: Any, model: str | None, temperature: float, seed: int) -> dict[str, Any]:
    """What a result depends on beside the prompt and the method."""
    import torch

    from attnrb import __version__
    from attnrb.models import DEFAULT_MODEL_NAME

    return {
        "attnrb": __version__,
        "model": model or DEFAULT_MODEL_NAME,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "temperature": temperature,
        "seed": seed,
    }
