"""The shapes of the pictures, as SVG text.

A picture is drawn on a card, so that it is readable on any page. The card follows the page's colour scheme if
the browser passes it to images (Chromium and Firefox do, and Prefect's UI sets it).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape

WIDTH = 720
"""Pixels, about the width of an artifact's column in Prefect's UI."""
CHARACTER = 0.6
"""Average width of a character, relative to its font size, for any usual font."""
STYLE = """\
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:#5b6070}
.t{font-size:15px;font-weight:600;fill:#1c1e26}
.n{font-size:13px;fill:#1c1e26}
.v{font-size:13px;font-weight:600;fill:#1c1e26;stroke:#fff;stroke-width:4;paint-order:stroke}
path,rect{fill:none;stroke-linecap:round}
.c{fill:#fff;stroke:#d5d8e0}
.g{stroke:#e6e8ee}
.l{stroke:#1f5fd0;stroke-width:1.5;stroke-linejoin:round;opacity:.35}
.p{stroke:#1f5fd0}
.f{stroke:#c2410c}
.b{stroke-width:1.5;opacity:.65}
.h{stroke:#5b6070;stroke-width:1.5;stroke-dasharray:5 4;stroke-linecap:butt}
@media(prefers-color-scheme:dark){
text{fill:#a9aebd}
.t,.n,.v{fill:#eef0f5}
.v{stroke:#1b1d23}
.c{fill:#1b1d23;stroke:#3b3f4a}
.g{stroke:#30333d}
.l,.p{stroke:#7fabff}
.f{stroke:#ff9966}
.h{stroke:#a9aebd}
}"""


def card(height: float, title: str, parts: Sequence[str]) -> str:
    """The picture: a card with these parts, and a title for screen readers."""
    back = f'<rect class="c" x=".5" y=".5" width="{WIDTH - 1}" height="{px(height - 1)}" rx="8"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{px(height)}" '
        f'viewBox="0 0 {WIDTH} {px(height)}" role="img"><title>{_text(title)}</title>'
        f"<style>{STYLE}</style>{back}{''.join(parts)}</svg>"
    )


def path(kind: str, pieces: Iterable[str], stroke: float | None = None) -> str:
    """All lines of one style as one element."""
    drawn = "".join(pieces)
    width = f' stroke-width="{px(stroke)}"' if stroke is not None else ""
    return f'<path class="{kind}"{width} d="{drawn}"/>' if drawn else ""


def marks(centres: Iterable[tuple[float, float]], passed: bool, size: float) -> str:
    """Dots for runs that passed, crosses for runs that did not."""
    if passed:  # a line of length 0 with round ends is a dot
        return path("p", (f"M{px(x)} {px(y)}h0" for x, y in centres), 2 * size)
    crosses = (
        f"M{px(x - size)} {px(y - size)}L{px(x + size)} {px(y + size)}"
        f"M{px(x - size)} {px(y + size)}L{px(x + size)} {px(y - size)}"
        for x, y in centres
    )
    return path("f", crosses, 2.5)


def write(x: float, y: float, words: str, *, kind: str = "", anchor: str = "") -> str:
    """A line of text; (x, y) is the point that `anchor` names: "" (the start), "middle" or "end"."""
    style = f' class="{kind}"' if kind else ""
    style += f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{px(x)}" y="{px(y)}"{style}>{_text(words)}</text>'


def _text(words: str) -> str:
    """Text escaped for XML; characters that XML does not allow are replaced."""
    return escape(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", words))


def length(words: str) -> int:
    """The number of characters; a wide one counts twice."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in words)


def shortened(words: str, size: float, width: float) -> str:
    """Text that fits into `width` pixels. The middle is left out, because names differ at both ends."""
    most = max(int(width / (size * CHARACTER)), 3)
    if length(words) <= most:
        return words
    kept = (most - 1) // (1 if words.isascii() else 2)
    return f"{words[: kept - kept // 2]}…{words[len(words) - kept // 2 :]}"


def px(pixels: float) -> str:
    """A coordinate, rounded to a tenth of a pixel."""
    return f"{pixels:.1f}".removesuffix(".0")
