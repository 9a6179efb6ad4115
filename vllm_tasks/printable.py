"""Text of rows and servers, as a terminal and a page may show it."""

from __future__ import annotations

import re

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters and line ends, those that turn the direction of writing, halves of characters."""


def printable(text: str) -> str:
    """Text of rows and servers as a log may show it: nothing in it that a terminal would obey."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
