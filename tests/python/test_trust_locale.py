"""Text that a person typed, where the locale knows ASCII alone and Python's UTF-8 mode is off."""

from __future__ import annotations

import pytest
from attnrb.text.reading import as_typed


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("größe".encode(), "größe"),
        (b"plain", "plain"),
        ("é".encode("latin-1"), "\udce9"),  # bytes of another encoding stay what they are, and are refused later
        ("日本 😀".encode(), "日本 😀"),
    ],
)
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_was_typed(raw: bytes, text: str, encoding: str) -> None:
    assert as_typed(raw.decode(encoding, "surrogateescape")) == text


def test_half_a_pair_stays() -> None:
    assert as_typed("a \ud83d b") == "a \ud83d b"
