"""Makes text of rows and servers safe to display in a terminal or on a page."""

from __future__ import annotations

import re

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line ends, characters that change the writing direction, and lone surrogates."""


def printable(text: str) -> str:
    """Replace the characters that a terminal would obey, so that a log may show text of rows and servers."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
