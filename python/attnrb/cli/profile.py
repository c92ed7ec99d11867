"""``attnrb profile``: which heads to edit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnrb.cli import files
from attnrb.cli.console import output, steps, user_errors
from attnrb.cli.loading import Loading, load_model, takes_model
from attnrb.reports.files import write_whole
from attnrb.reports.printable import printable

if TYPE_CHECKING:
    from attnrb.text.marked import Marked


@takes_model
def profile(
    *,
    examples: Annotated[
        Path | None,
        typer.Option(
            "--examples",
            help='JSON lines: {"prompt": "((…)) …", "answer": " …"}.',
            show_default="a built-in task",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the profile goes.")] = Path("profile.json"),
    keep: Annotated[int, typer.Option("--keep", min=1, help="How many heads to choose.")] = 32,
    rows: Annotated[str, typer.Option("--rows", help="Queries that heed spans: after, all or last.")] = "after",
    count: Annotated[int, typer.Option("--count", min=1, help="Examples of the built-in task.")] = 12,
    html: Annotated[Path | None, typer.Option("--html", help="Also write the heat map as a page of its own.")] = None,
    loading: Loading,
    json: files.JsonFile = None,
) -> None:
    """Rank the heads of a model by how much heeding marked text helps it to give the answers."""
    with user_errors(), steps() as step:
        from attnrb.policies import Emphasis

        files.check_outputs(json=json, html=html)
        policy = Emphasis(rows=rows)
        files.check_outputs(**({"out": out} if out.absolute().parent.is_dir() else {}))  # or it is made
        loaded, tokenizer = load_model(loading, step)
        from attnrb.studies.conflict import conflict_examples
        from attnrb.studies.profile import profile_heads
        from attnrb.studies.profile_page import profile_page

        pairs = conflict_examples(tokenizer, count) if examples is None else read_examples(tokenizer, examples)
        found = profile_heads(loaded, tokenizer, policy, pairs, keep, step)
        name = loading.options.name
        command = ["attnrb profile", f"--model {name}" if loading.options.model else "", f"--keep {found.keep}"]
        command += [f"--rows {rows}", f"--count {count}" if examples is None else f"--examples {examples.name}"]
        about = {**found.about, "command": " ".join(filter(None, command)), "model": name}
        found = replace(found, about=about)
        files.write_outputs({out: found.save, html: lambda path: write_whole(path, profile_page(found))})

    def show() -> None:
        from attnrb.cli.heat import heat_map

        console = output()
        console.print(heat_map(found, console))
        name = printable(str(out))
        console.print(f"Written to {name}: use it by --policy emphasis --set heads={name}", markup=False)
        if html is not None:
            console.print(f"The heat map is in {printable(str(html))}", markup=False)

    files.print_or_write_json(json, found.to_dict, show)


def read_examples(tokenizer: Any, path: Path) -> list[tuple[Marked, str]]:
    """Pairs of a marked prompt and its answer from a file of JSON lines.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is none of these, or its markup cannot be read. The message names the line.
    """
    from attnrb.text import mark
    from attnrb.text.reading import check_text, parse_json, read_text

    pairs = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # other ends of lines may stand in JSON's texts
        if not line.strip():
            continue
        try:
            example = parse_json(line)
        except ValueError as error:
            raise ValueError(f"examples: line {number} of {path.name} is not JSON: {error}") from None
        if not isinstance(example, dict) or set(example) != {"prompt", "answer"}:
            raise ValueError(f"examples: line {number} of {path.name}: expected an object with prompt and answer")
        try:
            check_text("a field", example)
            if not isinstance(example["answer"], str) or not example["answer"]:
                raise TypeError(f"answer: expected some text, got {example['answer']!r}")
            pairs.append((mark(tokenizer, example["prompt"]), example["answer"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"examples: line {number} of {path.name}: {error}") from None
    return pairs
