"""The commands of ``attnrb``: read options, call the library, print. `attnrb.cli.render` draws what they print."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any

import typer

from attnrb.cli import eval as eval_commands
from attnrb.cli import files, options, render
from attnrb.cli.analyze import analyze
from attnrb.cli.cache import cache
from attnrb.cli.command import add, shown
from attnrb.cli.console import OneSentence, output, steps, user_errors, warn, write
from attnrb.cli.data import data
from attnrb.cli.demo import demo
from attnrb.cli.loading import Loading, Threads, load_model, run_facts, set_threads, takes_model
from attnrb.cli.profile import profile
from attnrb.cli.search import search
from attnrb.cli.serve import serve
from attnrb.cli.study import app as study
from attnrb.reports.printable import printable
from attnrb.text.reading import as_typed

app = typer.Typer(
    help="Rewrite the attention of a language model while it runs.",
    cls=OneSentence,
    no_args_is_help=True,
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


@takes_model
@options.takes_policy
def compare(
    *,
    prompt: options.Prompt = None,
    loading: Loading,
    json: files.JsonFile = None,
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
        files.check_outputs(json=json)
        loaded, tokenizer = load_model(loading, step)
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
    about = run_facts(loaded, loading, temperature, seed)
    files.print_or_write_json(
        json,
        lambda: {**about, **comparison.to_dict()},
        lambda: render.comparison(output(), comparison, tokenizer, about),
    )


@takes_model
@options.takes_policy
def generate(
    *,
    prompt: options.Prompt = None,
    plain: Annotated[bool, typer.Option("--plain", help="Without re-balancing: the model as it is.")] = False,
    loading: Loading,
    json: files.JsonFile = None,
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
        files.check_outputs(json=json)
        with steps() as step:
            loaded, tokenizer = load_model(loading, step)
        from attnrb.studies.compare import DEFAULT_PROMPT
        from attnrb.studies.generation import generate as run
        from attnrb.studies.prompts import read_prompt

        text = DEFAULT_PROMPT if text is None else text
        output()  # makes stdout replace what it cannot encode

        def show(piece: str) -> None:
            write(printable(piece))

        read = read_prompt(loaded, tokenizer, text, chosen, chat=chat, markup=markup)

        silent = files.is_standard_output(json)  # then steps show that it is at work, else the text itself

        def go() -> Any:
            with steps() if silent else nullcontext(lambda _: None) as step:
                step("Generating")
                return run(
                    loaded,
                    tokenizer,
                    read.input_ids,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seed,
                    on_text=None if silent else show,
                )

        if plain:
            generation, stats = go(), None
        else:
            with read.patch(loaded) as patched:
                generation = go()
            stats = patched.stats

    def document() -> dict[str, Any]:
        return {
            **run_facts(loaded, loading, temperature, seed),
            "prompt": text,
            "config": None if plain else read.policy.to_dict(),
            "spans": None if read.spans is None else read.spans.to_dict()["rows"][0],
            **generation.to_dict(),
            "outliers_per_row": None if stats is None else stats.outliers_per_row,
            "rebalanced_layers": 0 if stats is None else stats.layers,
        }

    def end() -> None:
        write("\n")
        render.generation(generation, stats, read.spans)

    files.print_or_write_json(json, document, end)


def info(
    json: files.JsonFile = None,
    report: Annotated[
        bool, typer.Option("--report", help="Print Markdown to paste into an issue: no path, name or token in it.")
    ] = False,
) -> None:
    """Print versions, the instruction set in use, threads and build options."""
    if json is not None and report:
        raise typer.BadParameter("--json and --report exclude each other")
    with user_errors():
        files.check_outputs(json=json)
        if report:
            from attnrb.cli.report import report as report_text

            typer.echo(report_text())
            return
        from attnrb.cli.about import about

        facts = about()
    files.print_or_write_json(json, lambda: facts, lambda: render.facts(output(), facts))


@options.takes_policy
def bench(
    *,
    policy: options.PolicyChoice,
    threads: Threads = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 (fp32, bf16, fp16).")] = "float32",
    length: Annotated[int, typer.Option(min=16, help="Tokens in the sequence.")] = 1024,
    json: files.JsonFile = None,
) -> None:
    """Time re-balanced attention against PyTorch's on this machine, after checking its results."""
    with user_errors(), steps() as step:
        step("Starting")
        from attnrb.cli.selfbench import run
        from attnrb.models import resolve_dtype

        chosen = policy.policy() if policy.given else None
        files.check_outputs(json=json)
        set_threads(threads)
        report = run(length=length, dtype=resolve_dtype(dtype), policy=chosen, progress=step)
    files.print_or_write_json(json, report.to_dict, lambda: render.bench(output(), report))


def _prompt(prompt: str | None) -> str | None:
    if prompt == "-":
        return files.standard_input().strip()
    if prompt is not None and files.is_file(prompt):
        warn(f"the prompt {prompt!r} is also the name of a file, and is taken as text: `- < {prompt}` reads the file")
    return None if prompt is None else as_typed(prompt)


add(
    app,
    compare,
    examples=(
        'attnrb compare "Why is the sky blue?"',
        'attnrb compare "The river is ((full of ice)). Can we swim?" --set strength=16',
        "attnrb compare --alpha 0.5 --no-chat - < LICENSE",
        "attnrb compare -m Qwen/Qwen3-0.6B --dtype bf16 --device cuda --json out.json",
    ),
)
add(
    app,
    generate,
    examples=(
        'attnrb generate "Write a haiku about rain"',
        'attnrb generate --plain "Write a haiku about rain"',
        "attnrb generate --config options.yaml - < prompt.txt",
    ),
)
add(
    app,
    analyze,
    examples=(
        "attnrb analyze LICENSE --html out.html",
        'attnrb analyze "A sentence of several words" --compare alpha=0.3',
        "attnrb analyze texts.jsonl --compare 'emphasis(strength=8)' --json -",
    ),
)
add(
    app,
    eval_commands.evaluate,
    "eval",
    examples=(
        "attnrb data --out DIR piqa",
        "attnrb eval --tasks piqa --data DIR --limit 100",
        "attnrb eval --tasks mmlu,piqa --data DIR -c alpha=0.3 -c 'emphasis(strength=8)' --html out.html",
        "attnrb eval --config study.yaml --json study.json",
    ),
)
add(app, search, examples=("attnrb search --tasks piqa --data DIR --evaluations 30 --json s.json",))
add(
    app,
    profile,
    examples=("attnrb profile --keep 32 --html heads.html", "attnrb profile --examples pairs.jsonl -o profile.json"),
)
add(app, demo, examples=("attnrb demo", "attnrb demo -m Qwen/Qwen3-0.6B --dtype bf16"))
add(
    app,
    data,
    examples=(
        "attnrb data --out DIR piqa gsm8k mmlu",
        "attnrb data --out DIR siqa --source siqa=./my-copy",
        "attnrb data --out DIR --check",
    ),
)
app.add_typer(study, name="study")
app.add_typer(cache, name="cache")
add(app, info, examples=("attnrb info", "attnrb info --report"))
add(app, bench, examples=("attnrb bench", "attnrb bench --length 4096 --dtype bf16 --policy emphasis"))
_OTHERS_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}  # --config among them
app.command(
    context_settings=_OTHERS_OPTIONS,
    epilog=shown(
        (
            "attnrb serve Qwen/Qwen3-0.6B --port 8000 --dtype bfloat16",
            "attnrb serve ./my-model --policy emphasis --set strength=16",
        )
    ),
)(serve)
app.command("lm-eval", add_help_option=False, context_settings=_OTHERS_OPTIONS)(eval_commands.lm_eval)
