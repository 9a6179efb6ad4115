"""A picture of the seconds that each side takes for the short answers, with start-up and work separate."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks import results
from benchmarks.peers.page import OURS, WORDS
from benchmarks.peers.plan import SHORT
from vllm_tasks.validation import svg

LEFT, RIGHT = 300.0, 670.0
TOP, STEP, THICK = 58.0, 26.0, 12.0

Bar = tuple[str, float, float]
"""A side's name, its seconds of start-up, and its seconds of work."""


def draw(parts: Mapping[str, str]) -> str | None:
    """The picture as SVG, from the page's parts; None if none of them has short answers."""
    bars = [bar for part in parts.values() for bar in bars_of(part)]
    if not bars:
        return None
    longest = max(startup + seconds for _, startup, seconds in bars)
    shown = [
        svg.write(20, 26, "Seconds for the short answers", kind="t"),
        svg.write(
            20, 44, "grey: start-up (for a client, without the server's); colour: work; ours in orange"
        ),
    ]
    for number, bar in enumerate(bars):
        shown += drawn(bar, TOP + STEP * number + STEP / 2, (RIGHT - LEFT) / longest)
    return svg.card(TOP + STEP * len(bars) + 14, "Seconds for the short answers by side", shown)


def bars_of(part: str) -> list[Bar]:
    """The sides of a part, from its table of short answers."""
    found = results.below(part, WORDS[SHORT])
    cells = results.cells_of(found) if found else []
    return [(row["side"].strip("*"), float(row["start-up, s"]), float(row["work, s"])) for row in cells]


def drawn(bar: Bar, y: float, scale: float) -> list[str]:
    name, startup, seconds = bar
    middle, end = LEFT + startup * scale, LEFT + (startup + seconds) * scale
    return [
        svg.write(LEFT - 12, y + 4, svg.shortened(name, 13, LEFT - 30), kind="n", anchor="end"),
        f'<path stroke="#9aa0ae" style="stroke-linecap:butt" stroke-width="{THICK:g}" '
        f'd="M{svg.px(LEFT)} {svg.px(y)}H{svg.px(middle)}"/>',
        f'<path class="{"f" if name in OURS else "p"}" style="stroke-linecap:butt" '
        f'stroke-width="{THICK:g}" d="M{svg.px(middle)} {svg.px(y)}H{svg.px(end)}"/>',
        svg.write(end + 8, y + 4, f"{startup + seconds:.0f}", kind="n"),
    ]
