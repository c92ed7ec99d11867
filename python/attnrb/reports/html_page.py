"""A report as one HTML page that needs nothing else: styles, scripts, data and the plotting library are in it.

What a page shows that is not its own is escaped, or stands in a block of JSON that no character can end and from which
the script makes text nodes. A content security policy allows its scripts by their hashes, and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attnrb.reports.printable import printable

if TYPE_CHECKING:
    from importlib.abc import Traversable

__all__ = ["THEME_BUTTON", "document", "escape", "json_block", "plotly_source"]

_COMPLETE = "This page is complete: it loads nothing."
_ASKS = "This page asks the program that serves it for single rows, and nobody else for anything."
_CONNECT = "; connect-src 'self'"
_NEWLINE = "\n"  # which no f-string may hold before Python 3.12
_NEEDS_SCRIPTS = "<noscript>This page draws its pictures with JavaScript, which is turned off here.</noscript>"
THEME_BUTTON = '<button type="button" id="theme" class="screen">Dark</button>'
"""Switches between light and dark; every page has it once."""


def document(
    title: str,
    body: str,
    *,
    package: str,
    extra: str | None,
    version: str,
    scripts: Sequence[str] = ("page",),
    asks_server: bool = False,
) -> str:
    """A whole page.

    Args:
        title: text.
        body: HTML, with `THEME_BUTTON` in it.
        package: the package whose ``page.css``, if it has one, and scripts are added to what all pages have.
        extra: the extra of attnrb that brings plotly; None: the page draws nothing with it.
        version: of attnrb.
        scripts: names of the package's scripts, without ``.js``, in order; one that is not there is left out.
        asks_server: whether the page may ask the server that it came from, and nobody else.

    Raises:
        ImportError: plotly is missing.
    """
    plotly = None if extra is None else plotly_source(extra)
    own, ours = (importlib.resources.files(each) for each in (package, __package__))
    style = _read(ours, "html_page.css") + _read(own, "page.css")
    kit = ["html_page.js", *(["figures.js"] if plotly is not None else [])]
    script = "".join([_read(ours, name) for name in kit] + [_read(own, f"{name}.js") for name in scripts])
    sources = [each for each in (plotly, script) if each is not None]
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, sources))}; style-src 'unsafe-inline'; "
        f"img-src data: blob:; base-uri 'none'; form-action 'none'{_CONNECT if asks_server else ''}"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="attnrb {escape(version)}">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
{"" if plotly is None else _NEEDS_SCRIPTS}
{body}
<footer class="small soft">Made by attnrb {escape(version)}. {_ASKS if asks_server else _COMPLETE}</footer>
{"".join(f"<script>{each}</script>{_NEWLINE}" for each in sources)}</body>
</html>
"""


def _read(folder: Traversable, name: str) -> str:
    file = folder.joinpath(name)
    return file.read_text("utf-8") if file.is_file() else ""


def escape(value: object) -> str:
    """Text as HTML, with what cannot be seen spelt out."""
    return html.escape(printable(str(value)))


def json_block(name: str, value: Any) -> str:
    """A value for scripts, which find it by its name."""
    document = json.dumps(value, allow_nan=False, separators=(",", ":"))
    # No character in it has a meaning in HTML.
    document = document.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f'<script type="application/json" id="{name}">{document}</script>'


def plotly_source(extra: str) -> str:
    """The plotting library, as text for a script. Raises ImportError where it is missing; `extra` brings it."""
    try:
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"the HTML report needs the package plotly: run `pip install 'attnrb[{extra}]'`") from error
    source: str = get_plotlyjs()
    return source.replace("</script", "<\\/script")  # which would end the script in a page


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
