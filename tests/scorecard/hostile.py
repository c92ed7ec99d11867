"""Texts that try to be more than text, drawn at random: markup, scripts, styles, commands of a terminal, Unicode."""

from __future__ import annotations

import random

_MARK = "window.caught=1"
_PARTS = (
    f"<script>{_MARK}</script>",
    f"</script><script>{_MARK};alert(1)</script>",
    f"<img src=x onerror={_MARK}>",
    f'"><img src=https://example.invalid/x onerror="{_MARK}">',
    f"'><svg/onload={_MARK}>",
    f'" onmouseover="{_MARK}" x="',
    f"<iframe srcdoc='<script>parent.{_MARK}</script>'></iframe>",
    f"<a href=javascript:{_MARK}>a</a>",
    "<base href=https://example.invalid/>",
    "<link rel=stylesheet href=https://example.invalid/s.css>",
    "<meta http-equiv=refresh content='0;url=https://example.invalid/'>",
    "<style>*{display:none!important}</style>",
    "<style>@import 'https://example.invalid/s.css';</style>",
    "<form action=https://example.invalid/><input autofocus onfocus=" + _MARK + ">",
    "</title><script>" + _MARK + "</script>",
    "</style></textarea></noscript></template>",
    "<!--",
    "-->",
    "<![CDATA[",
    "]]>",
    "<plaintext>",
    "<details open ontoggle=" + _MARK + ">",
    "&lt;script&gt;",
    "&#x3c;script&#x3e;",
    "&amp;amp;",
    "\\u003cscript\\u003e",
    "\\x3cscript\\x3e",
    "${" + _MARK + "}",
    "{{constructor.constructor('" + _MARK + "')()}}",
    "`;" + _MARK + "//",
    "';" + _MARK + "//",
    '";' + _MARK + "//",
    "\\",
    "\\'",
    "\\\n",
    "__proto__",
    "constructor",
    "toString",
    "=1+1",
    "\u2028",
    "\u2029",
    "\u202egnp.exe",
    "\u2066\u2067\u2069",
    "\x00",
    "\x1b[2J\x1b[31m",
    "\x1b]0;title\x07",
    "\x7f\x85",
    "\ufeff",
    "\ufffd",
    "\U000e0041",
    "e\u0301\u0301\u0301\u0301",
    "<\u200bscript>",
    "\uff1cscript\uff1e",
    "😀" * 3,
    "<b>",
    "%3Cscript%3E",
    "a" * 400,
    "\r\n\t ",
    "$&$1$`",
    "%s%n%d",
)


def draw(seed: int) -> str:
    """One text of one to four parts, some in other letters."""
    rng = random.Random(seed)
    parts = [rng.choice(_PARTS) for _ in range(rng.choice((1, 1, 2, 3, 4)))]
    if rng.random() < 0.2:
        parts = ["".join(rng.choice((c.upper(), c.lower())) if c.isascii() else c for c in part) for part in parts]
    if rng.random() < 0.2:
        place = rng.randrange(len(parts[0]) + 1)
        parts[0] = parts[0][:place] + rng.choice(("/", " ", "\t", "\n", "\x0c", "\x00", "<")) + parts[0][place:]
    return "".join(parts)
