"""The notebooks: runs them and stores their outputs; and makes pages of them when the site is built.

.venv/bin/python docs/notebooks.py [NAME ...]

The second part is a hook of MkDocs (mkdocs.yml names this file), which needs nothing but the stored outputs.
"""

from __future__ import annotations

import base64
import html
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_suffix("")
_OURS = '<div class="attnrb-fragment">'  # of attnrb.reports.fragment, which escapes every text


def run(path: Path) -> Any:
    """A notebook of nbformat, executed from the first cell on in a process of its own.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # times of this run
        if cell.cell_type == "code":  # progress bars and warnings of libraries, with paths of this machine
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    return notebook


def store(path: Path) -> None:
    """Run a notebook and write it back with what it said."""
    notebook = run(path)
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec",)} | {"language_info": {"name": "python"}}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- the site


def page(notebook: dict[str, Any]) -> str:
    """Markdown of a stored notebook: its text, its code, and what that printed."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += filter(None, map(shown, cell["outputs"]))
    return "\n\n".join(parts) + "\n"


def shown(output: dict[str, Any]) -> str:
    """One output as Markdown."""
    if output["output_type"] == "stream":
        return _text("".join(output["text"]))
    data = output.get("data", {})
    if "image/svg+xml" in data:
        picture = base64.b64encode("".join(data["image/svg+xml"]).encode()).decode()
        source = f"data:image/svg+xml;base64,{picture}"
        return f'<img class="notebook-figure" alt="The figure that this cell draws" src="{source}">'
    if (fragment := "".join(data.get("text/html", ""))).startswith(_OURS):
        return _one_line(fragment)
    return _text("".join(data.get("text/plain", "")))


def _one_line(fragment: str) -> str:
    """HTML that Markdown passes on as it is: a blank line in it would end that."""
    style, end, rest = fragment.partition("</style>")
    return " ".join(style.split()) + end + rest.replace("\n", "&#10;")


def _text(text: str) -> str:
    return f'<pre class="notebook-output">{html.escape(text.rstrip())}</pre>' if text.strip() else ""


def on_files(files: Any, config: Any) -> Any:
    """Beside each notebook, its page."""
    from mkdocs.structure.files import File

    for path in sorted(FOLDER.glob("*.ipynb")):
        content = page(json.loads(path.read_text("utf-8")))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=content))
    return files


if __name__ == "__main__":
    for stored in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or stored.stem in sys.argv[1:]:
            store(stored)
