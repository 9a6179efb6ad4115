"""Numeric match: 1 if the answer's number equals the target's, else 0; the value is the mean over rows.

Range 0 to 1, higher is better. A text's number is the one after its first `####`, as in the answers of GSM8K
(Cobbe et al. 2021, https://arxiv.org/abs/2110.14168), else the last number in the text.
"""

from __future__ import annotations

import re
from decimal import Context, Decimal, InvalidOperation, localcontext
from typing import Any

from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.text import accepted, text_of

# A minus belongs to the number unless it follows a word, a number or a bracket, as in 10-5. Each part matches
# or fails within a few characters, so that the search takes time linear in the text's length.
_NUMBER = r"""
    (?: (?<![\w.,%)\]}]) (?P<minus>[-\u2212]) )? [$€£]?
    (?P<number>
        (?: \d{1,3} (?:,\d{3})+ (?!\d) | \d+ ) (?:\.\d+)?
      | (?<![\w.]) \.\d+
    )
    (?P<exponent> [eE][+-]?\d+ )?
"""
NUMBER = re.compile(_NUMBER, re.VERBOSE)
MARKED = re.compile(rf"\#\#\#\#[ \t]* {_NUMBER}", re.VERBOSE)

EXACT = Context(prec=1000, traps=[InvalidOperation])


def score(prediction: Any, target: Any, *, tolerance: float | str = 0) -> bool:
    """Return whether the numbers are equal, in decimal arithmetic, or differ by `tolerance` at most.

    A number may have a sign, thousands separators (1,234), decimals, an exponent (1e5) and the digits of any
    script. A currency sign before it, and a percent sign or full stop after it, are ignored, so 50% is 50.
    Words and fractions are not calculated: 1/2 is 2.

    Args:
        prediction: The model's answer. One without a number is a miss.
        target: A number or a text with one, or a list of them of which any may match.
        tolerance: The largest difference that counts as equal. A text such as "0.01" works too.

    Raises:
        InvalidCall: A target has no number, the tolerance is below 0, or a target or answer is not a text.
    """
    most = _tolerance(tolerance)
    wanted = [_wanted(text) for text in accepted(target, "numeric_match")]
    found = number_in(text_of(prediction, "numeric_match"))
    return found is not None and any(_near(found, number, most) for number in wanted)


def number_in(text: str) -> Decimal | None:
    """Return the number of a text, or None if it has none or one with an exponent too large for `Decimal`."""
    match = MARKED.search(text)
    if match is None:
        for match in NUMBER.finditer(text):  # noqa: B007 - the last one
            pass
    if match is None:
        return None
    sign = "-" if match["minus"] else ""
    try:
        with localcontext(EXACT):
            return Decimal(f"{sign}{match['number'].replace(',', '')}{match['exponent'] or ''}")
    except InvalidOperation:
        return None


def _wanted(text: str) -> Decimal:
    number = number_in(text)
    if number is None:
        raise InvalidCall(f"numeric_match needs a number in the target, and {text!r:.100} has none")
    return number


def _near(found: Decimal, wanted: Decimal, tolerance: Decimal) -> bool:
    # Only the caller's numbers are added. A model's 1e999999999 is just compared, which costs nothing.
    if not tolerance:
        return found == wanted
    return EXACT.subtract(wanted, tolerance) <= found <= EXACT.add(wanted, tolerance)


def _tolerance(given: float | str) -> Decimal:
    try:
        with localcontext(EXACT):
            tolerance = Decimal(str(given))
    except InvalidOperation:
        tolerance = Decimal("nan")
    if not tolerance.is_finite() or tolerance < 0:
        raise InvalidCall(f"tolerance must be a number of at least 0, such as 0.01, not {given!r:.100}")
    return tolerance


MEASURE = Measure(score)
