"""Makes text of rows and servers safe to display in a terminal, on a page or in a notebook."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Control characters, line ends, characters that change the writing direction or are invisible (the tags of
Unicode, which hide a text in a text), and lone surrogates. The joiners U+200C and U+200D are part of words
and of pictures."""


def printable(text: str) -> str:
    """Replace the characters that a terminal would obey, so that a log may show text of rows and servers."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def one_line(text: str, length: int) -> str:
    """Return at most `length` characters of a text on one line; an ellipsis stands for the rest."""
    # Only the beginning is looked at: an answer may have megabytes.
    words = " ".join(text[: 4 * length].split())
    return words if len(words) <= length and len(text) <= 4 * length else f"{words[: length - 1]}…"


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in HTML for a notebook. All texts are escaped."""
    left = 'style="text-align: left"'  # a notebook's own rule is right
    lines = ["".join(f"<th {left}>{html_text(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td {left}>{html_text(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def html_text(text: str) -> str:
    """Return text in HTML: no markup in it works, and no character that a terminal would obey is left."""
    return html.escape(printable(text))
