"""`python -m benchmarks [P1 ...]`: prints one line for each figure, `P<n> <value> <what>`."""

from __future__ import annotations

import signal
import sys

from benchmarks import (
    coverage,
    gate,
    long_run,
    mixed,
    overload,
    p1,
    p2,
    p3,
    p5,
    p6,
    p7,
    p8,
    p9,
    p10,
    p11,
    p11_shards,
    p12,
    parity,
    repair,
    results,
    risk,
    same,
    scale,
    start,
    window,
    writers,
)
from benchmarks.options import parse

MEASURES = {
    "P1": p1.measure,
    "P2": p2.measure,
    "P3": p3.measure,
    "P5": p5.measure,
    "P6": p6.measure,
    "P7": p7.measure,
    "P8": p8.measure,
    "P9": p9.measure,
    "SAME": same.measure,
    "START": start.measure,
    "COVERAGE": coverage.measure,
    "GATE": gate.measure,
    "REPAIR": repair.measure,
    "RISK": risk.measure,
    "PARITY": parity.measure,
    "P10": p10.measure,
    "P11": p11.measure,
    "P11-SHARDS": p11_shards.measure,
    "P12": p12.embed,
    "P13": p12.score,
    "WRITERS": writers.measure,
    "SCALE": scale.measure,
    "WINDOW": window.measure,
    "MIXED": mixed.measure,
    "OVERLOAD": overload.measure,
    "LONG-RUN": long_run.measure,
}


def main() -> None:
    """Run the requested measures; SIGINT and SIGTERM close all child processes first."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with it ignored
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = parse(sys.argv[1:], tuple(MEASURES))
    results.commit()
    for name in options.measures:
        for line in MEASURES[name](options):
            print(line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
