"""Word problems and terms with one number as the answer, from one step (level 1) to several (level 3)."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from reference_sets.draws import Draws

PEOPLE = ("Ada", "Ben", "Chidi", "Dana", "Emeka", "Farah", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena")
GOODS = ("notebooks", "candles", "apples", "bricks", "stamps", "tiles", "lemons", "pencils", "buttons")
MADE = ("candles", "bricks", "tiles", "pencils", "buttons")
"""What machines make."""
PLACES = ("a library", "a bakery", "a school", "a warehouse", "a garden centre", "a museum shop")
EACH = 20
"""Rows of each topic."""

Problem = tuple[str, int | float]


def rows() -> list[dict[str, Any]]:
    """Return 240 rows: 12 topics of 20 rows, and no question twice."""
    found: list[dict[str, Any]] = []
    for topic, (level, make) in TOPICS.items():
        draws = Draws(f"arithmetic {topic}")
        problems: dict[str, int | float] = {}
        while len(problems) < EACH:
            question, answer = make(draws, len(problems))
            problems.setdefault(question, answer)
        found += [
            {"id": f"{topic}-{i}", "topic": topic, "level": level, "question": question, "answer": answer}
            for i, (question, answer) in enumerate(problems.items(), 1)
        ]
    return found


def _sums(draws: Draws, i: int) -> Problem:
    a, b, c = draws.number(12, 480), draws.number(12, 480), draws.number(12, 480)
    who, goods = draws.one(PEOPLE), draws.one(GOODS)
    return (
        (f"What is {a} + {b}?", a + b),
        (f"Add {a}, {b} and {c}.", a + b + c),
        (f"{who} has {a} {goods} and is given {b} more. How many {goods} does {who} have now?", a + b),
        (f"In three days {draws.one(PLACES)} sells {a}, {b} and {c} {goods}. How many is that?", a + b + c),
    )[i % 4]


def _differences(draws: Draws, i: int) -> Problem:
    a, b = draws.number(200, 900), draws.number(20, 199)
    who, goods = draws.one(PEOPLE), draws.one(GOODS)
    return (
        (f"What is {a} - {b}?", a - b),
        (f"What is {b} - {a}?", b - a),
        (f"{who} had {a} {goods} and gave away {b} of them. How many {goods} are left?", a - b),
        (f"How much larger is {a} than {b}?", a - b),
    )[i % 4]


def _products(draws: Draws, i: int) -> Problem:
    a, b = draws.number(6, 35), draws.number(3, 19)
    goods = draws.one(GOODS)
    return (
        (f"What is {a} * {b}?", a * b),
        (f"There are {a} boxes with {b} {goods} each. How many {goods} are there?", a * b),
        (f"A hall has {a} rows of {b} seats. How many seats does it have?", a * b),
        (f"Multiply {a} by {b}, then by 10.", a * b * 10),
    )[i % 4]


def _quotients(draws: Draws, i: int) -> Problem:
    a, b, rest = draws.number(7, 60), draws.number(4, 15), draws.number(1, 3)
    goods, place = draws.one(GOODS), draws.one(PLACES)
    return (
        (f"What is {a * b} / {b}?", a),
        (f"{a * b} {goods} are shared equally by {b} people. How many {goods} does each get?", a),
        (f"What is the remainder when {a * b + rest} is divided by {b}?", rest),
        (
            f"For {place}, {a * b + rest} {goods} are packed into boxes of {b}. How many boxes are full?",
            a,
        ),
    )[i % 4]


def _order_of_operations(draws: Draws, i: int) -> Problem:
    a, b, c, d = draws.number(2, 30), draws.number(2, 12), draws.number(2, 12), draws.number(2, 30)
    return (
        (f"What is {a} + {b} * {c}?", a + b * c),
        (f"What is ({a} + {b}) * {c}?", (a + b) * c),
        (f"What is {a} * {b} - {c} * {d}?", a * b - c * d),
        (f"What is {b * c} / {c} + {a} * {d}?", b + a * d),
    )[i % 4]


def _percentages(draws: Draws, i: int) -> Problem:
    share, hundreds = draws.one((5, 10, 15, 20, 25, 30, 40, 60, 75)), draws.number(2, 18)
    whole, who = hundreds * 100, draws.one(PEOPLE)
    part = share * hundreds
    return (
        (f"What is {share}% of {whole}?", part),
        (f"A price of ${whole} is reduced by {share}%. What is the new price in dollars?", whole - part),
        (
            f"{who} earns ${whole} a week and gets {share}% more. How many dollars a week is that?",
            whole + part,
        ),
        (f"Of {whole} visitors {part} are children. What percentage of the visitors are children?", share),
    )[i % 4]


def _fractions(draws: Draws, i: int) -> Problem:
    bottom = draws.one((3, 4, 5, 6, 8))
    top, unit = draws.number(1, bottom - 1), draws.number(4, 24)
    whole, goods = bottom * unit, draws.one(GOODS)
    return (
        (f"What is {top}/{bottom} of {whole}?", top * unit),
        (f"{top}/{bottom} of {whole} {goods} are sold. How many are left?", whole - top * unit),
        (f"Take 1/{bottom} of {whole} away from {whole}. What is left?", whole - unit),
        (f"1/{bottom} of a number is {unit}. What is the number?", whole),
    )[i % 4]


def _money(draws: Draws, i: int) -> Problem:
    cents, count = 5 * draws.number(15, 95), draws.number(2, 9)
    who, goods = draws.one(PEOPLE), draws.one(GOODS)
    total = cents * count
    note = next(note for note in (1000, 2000, 5000, 10000) if note > total)
    return (
        (f"One ticket costs ${cents / 100:.2f}. How many dollars do {count} tickets cost?", _dollars(total)),
        (
            f"{who} buys {count} {goods} at ${cents / 100:.2f} each and pays with ${note // 100}. How many "
            "dollars is the change?",
            _dollars(note - total),
        ),
        (
            f"{count} people share a bill of ${total / 100:.2f} equally. How many dollars does each pay?",
            _dollars(cents),
        ),
        (
            f"{who} saves ${cents / 100:.2f} a day. How many dollars is that in two weeks?",
            _dollars(14 * cents),
        ),
    )[i % 4]


def _times(draws: Draws, i: int) -> Problem:
    hour, minute, lasts = draws.number(6, 18), 5 * draws.number(0, 11), 5 * draws.number(4, 44)
    end = hour * 60 + minute + lasts
    days, hours = draws.number(2, 9), draws.number(1, 23)
    begins, ends = f"{hour:02d}:{minute:02d}", f"{end // 60:02d}:{end % 60:02d}"
    return (
        (f"A film begins at {begins} and ends at {ends} on the same day. How many minutes does it last?", lasts),
        (f"How many hours are {days} days and {hours} hours?", days * 24 + hours),
        (f"A train leaves at {begins} and needs {lasts} minutes. At how many minutes past the hour does it arrive?",
         end % 60),
        (f"How many seconds are {days} minutes and {hours} seconds?", days * 60 + hours),
    )[i % 4]  # fmt: skip


def _rates(draws: Draws, i: int) -> Problem:
    speed, hours = 5 * draws.number(8, 24), draws.number(2, 6)
    workers, each, days = draws.number(3, 9), draws.number(4, 20), draws.number(2, 9)
    who, goods = draws.one(PEOPLE), draws.one(MADE)
    return (
        (
            f"A car drives {hours} hours at {speed} km per hour and then 2 hours at {speed - 15} km per hour. "
            "How many kilometres does it drive?",
            hours * speed + 2 * (speed - 15),
        ),
        (
            f"{workers} machines make {workers * each} {goods} an hour. How many {goods} do {workers + 2} "
            f"such machines make in {days} hours?",
            (workers + 2) * each * days,
        ),
        (
            f"{who} reads {each} pages a day. After {days} days, {workers * each} pages of the book are left. "
            "How many pages does the book have?",
            each * days + workers * each,
        ),
        (
            f"An empty tank holds {speed * hours} litres. A pump fills {speed} litres an hour into it. How many "
            f"litres can still be filled in after {hours - 1} hours?",
            speed,
        ),
    )[i % 4]


def _averages(draws: Draws, i: int) -> Problem:
    mean, off, far = draws.number(30, 90), draws.number(2, 12), draws.number(13, 25)
    who = draws.one(PEOPLE)
    return (
        (f"What is the average of {mean - off}, {mean} and {mean + off}?", mean),
        (
            f"{who} has {mean - far}, {mean + off}, {mean + far} and {mean - off} points in four games. What "
            "is the average?",
            mean,
        ),
        (
            f"The average of three numbers is {mean}. Two of them are {mean - off} and {mean + far}. What is "
            "the third?",
            mean + off - far,
        ),
        (f"What is the median of {mean + far}, {mean - far}, {mean}, {mean + off} and {mean - off}?", mean),
    )[i % 4]


def _several_steps(draws: Draws, i: int) -> Problem:
    who, other = draws.several(PEOPLE, 2)
    a, b, c, d = draws.number(5, 20), draws.number(2, 6), draws.number(3, 12), draws.number(2, 9)
    goods, place = draws.one(GOODS), draws.one(PLACES)
    area = (a + d) * a
    return (
        (
            f"{who} has {a} {goods}. {other} has {b} times as many, less {d}. How many {goods} do they have "
            "together?",
            a + a * b - d,
        ),
        (
            f"In {d} years {who} will be twice as old as {other}, who is {a} now. How old is {who} now?",
            2 * (a + d) - d,
        ),
        (
            f"For {place}, {c} boxes of {a} {goods} arrive, and {d} of the {goods} are broken. The others are "
            f"sold for ${b} each. How many dollars is that?",
            (c * a - d) * b,
        ),
        (
            f"A field is {a + d} metres long and {a} metres wide. A path takes {c} square metres of it. How "
            "many square metres are left?",
            area - c,
        ),
    )[i % 4]


def _dollars(cents: int) -> int | float:
    """Return an amount in dollars, a whole one without decimals."""
    dollars = Fraction(cents, 100)
    return int(dollars) if dollars.denominator == 1 else float(dollars)


TOPICS: dict[str, tuple[int, Callable[[Draws, int], Problem]]] = {
    "sums": (1, _sums),
    "differences": (1, _differences),
    "products": (1, _products),
    "quotients": (1, _quotients),
    "order_of_operations": (2, _order_of_operations),
    "percentages": (2, _percentages),
    "fractions": (2, _fractions),
    "money": (2, _money),
    "times": (2, _times),
    "rates": (3, _rates),
    "averages": (3, _averages),
    "several_steps": (3, _several_steps),
}
"""The level of each topic, and what makes its problems, by the number of the problem."""
