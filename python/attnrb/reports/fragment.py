"""What a value shows of itself in a notebook: a piece of HTML that changes nothing around it.

It has no script, loads nothing, and every rule of its style is for its own class. Colours are those of the notebook.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnrb.reports.html_page import escape

__all__ = ["fragment", "rows_table", "shaded"]

_STYLE = """
.attnrb-fragment { max-width: 900px; line-height: 1.45; }
.attnrb-fragment h4 { margin: 0 0 4px; }
.attnrb-fragment p { margin: 0 0 8px; }
.attnrb-fragment table { border-collapse: collapse; margin: 0 0 8px; }
.attnrb-fragment th, .attnrb-fragment td { padding: 2px 10px; text-align: right; border-bottom: 1px solid rgba(128, 128, 128, 0.35); }
.attnrb-fragment th:first-child, .attnrb-fragment td:first-child { text-align: left; }
.attnrb-fragment .text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 16em; overflow: auto; }
.attnrb-fragment .t { background: rgba(245, 158, 11, var(--a)); border-radius: 3px; }
.attnrb-fragment .o { box-shadow: inset 0 -2px 0 #d1453b; }
"""  # noqa: E501


def fragment(title: str, lead: str, *parts: str) -> str:
    """A piece of HTML from a title and a sentence, which are text, and parts, which are HTML."""
    lead = f"<p>{escape(lead)}</p>" if lead else ""
    return f'<div class="attnrb-fragment"><style>{_STYLE}</style><h4>{escape(title)}</h4>{lead}{"".join(parts)}</div>'


def rows_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>"


def shaded(pieces: Sequence[tuple[str, float, bool]]) -> str:
    """A text in pieces, each with its shade from 0 to 1, and whether it is underlined."""
    spans = "".join(
        f'<span class="t{" o" if marked else ""}" style="--a:{shade:.2f}">{escape(text)}</span>'
        for text, shade, marked in pieces
    )
    return f'<div class="text">{spans}</div>'
