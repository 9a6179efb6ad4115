"""A picture of the seconds that each side takes for the short answers, with start-up and work separate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.peers.field import Field
from benchmarks.peers.page import OURS, work
from benchmarks.peers.plan import SHORT
from vllm_tasks.validation import svg

LEFT, RIGHT = 300.0, 670.0
TOP, STEP, THICK = 58.0, 26.0, 12.0

Bar = tuple[str, float, float]
"""A side's name, its seconds of start-up, and its seconds of work."""


def draw(fields: Sequence[Field]) -> str | None:
    """The picture as SVG; None if no short answers were measured."""
    bars = [bar for field in fields for bar in bars_of(field)]
    if not bars:
        return None
    longest = max(startup + seconds for _, startup, seconds in bars)
    parts = [
        svg.write(20, 26, "Seconds for the short answers", kind="t"),
        svg.write(
            20, 44, "grey: start-up (for a client, without the server's); colour: work; ours in orange"
        ),
    ]
    for number, bar in enumerate(bars):
        parts += drawn(bar, TOP + STEP * number + STEP / 2, (RIGHT - LEFT) / longest)
    return svg.card(TOP + STEP * len(bars) + 14, "Seconds for the short answers by side", parts)


def bars_of(field: Field) -> list[Bar]:
    return [
        (
            name,
            field.sides_ever[name].startup + statistics.median(run.outcome.startup for run in runs),
            statistics.median(work(field.sides_ever[name], run) for run in runs),
        )
        for (workload, name), runs in field.runs.items()
        if workload == SHORT
    ]


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
