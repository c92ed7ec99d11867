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
from typing import Any

from attnrb.reports.printable import printable

__all__ = ["THEME_BUTTON", "document", "escape", "json_block", "plotly_source"]

_NEWLINE = "\n"  # which no f-string may hold before Python 3.12
_NEEDS_SCRIPTS = "<noscript>This page draws its pictures with JavaScript, which is turned off here.</noscript>"
THEME_BUTTON = '<button type="button" id="theme" class="screen">Dark</button>'
"""Switches between light and dark; every page has it once."""


def document(title: str, body: str, *, package: str, extra: str | None, version: str) -> str:
    """A whole page.

    Args:
        title: text.
        body: HTML, with `THEME_BUTTON` in it.
        package: the package whose ``page.css`` and ``page.js``, if it has them, are added to what all pages have.
        extra: the extra of attnrb that brings plotly; None: the page draws nothing with it.
        version: of attnrb.

    Raises:
        ImportError: plotly is missing.
    """
    plotly = None if extra is None else plotly_source(extra)
    folders = [importlib.resources.files(each) for each in (__package__, package)]
    names = ("html_page", "page")
    style, script = (
        "".join(
            file.read_text("utf-8")
            for folder, name in zip(folders, names, strict=True)
            if (file := folder.joinpath(f"{name}.{kind}")).is_file()
        )
        for kind in ("css", "js")
    )
    scripts = [each for each in (plotly, script) if each is not None]
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
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
<footer class="small soft">Made by attnrb {escape(version)}. This page is complete: it loads nothing.</footer>
{"".join(f"<script>{each}</script>{_NEWLINE}" for each in scripts)}</body>
</html>
"""


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
