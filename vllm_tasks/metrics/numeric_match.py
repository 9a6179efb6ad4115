"""Numeric match: 1 if the answer's number equals the target's, else 0; the value is the mean over rows.

Range 0 to 1, higher is better. A text's number is the one after its first `####`, as in the answers of GSM8K
(Cobbe et al. 2021, https://arxiv.org/abs/2110.14168), else the last number in the text.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Context, Decimal, InvalidOperation, localcontext
from typing import Any

from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.text import accepted, text_of

# A minus belongs to the number unless it follows a word, a number or a bracket, as in 10-5. Each part matches
# or fails within a few characters, so that the search takes time linear in the text's length.
_MINUS = "[-\u2212\u2013\ufe63\uff0d]"
_SEPARATOR = "(?: [,\uff0c\u066c_'\u2019\u00a0\u2009\u202f] | \\\\, | \\{,\\} )"
_SAID = r"""
    (?: (?<![\s\S]) | (?<=\b(?:is|be|at|to|of)[ ]) | (?<=\bwas[ ]) | (?<=[:=*][ ]) | (?<=\#[ ]) )
"""
"""What stands before a "minus" that is a sign, and not a subtraction: "it is minus 5"."""
_POWER_OF_TEN = r"10 (?:\^|\*\*) [{]? (?P<%s> [-+\u2212]?\d+ )"
_NUMBER = rf"""
    (?: (?<![^\W_]) (?<![.,%)\]}}]) (?P<minus>
        {_MINUS} | (?<==[ ]) {_MINUS} [ ] | [Nn]egative [ ] | {_SAID} [Mm]inus [ ]
    ) )?
    (?: \\?[$€£¥₹₩₽] [ ]? )?
    (?:
        (?<![\d/.,]) (?<!/[ ]) (?: (?P<whole>\d++)[ ] )?
        (?P<top>\d++) [ ]? / [ ]? (?P<bottom>\d++) (?! [ ]? / | [.,]\d )
      | (?<![\d.,]) (?P<european>
            (?!0) \d{{1,3}} (?: (?: \.\d{{3}} ){{2,6}} (?: ,\d{{1,2}} )? | (?: \.\d{{3}} ){{1,6}} ,\d{{1,2}} )
        ) (?! [.,]?\d )
      | {_POWER_OF_TEN % "tens"}
      | (?P<number>
            (?:
                \d{{1,3}} (?: {_SEPARATOR} \d{{3}} )+ (?!\d)
              | (?<!\d[ ]) [1-9]\d{{0,2}} (?: [ ] \d{{3}} ){{1,6}} (?! [-\w] | [ ]\d )
              | \d{{1,2}} (?: {_SEPARATOR} \d\d ){{1,9}} {_SEPARATOR} \d{{3}} (?!\d)
              | \d+
            ) (?: [.\u066b]\d+ )?
          | (?<![^\W_]) (?<!\.) \.\d+
        )
        (?:
            [eE] (?P<exponent> [-+]?\d+ )
          | [ ]? (?: [xX*\u00d7\u00b7\u22c5] | \\times | \\cdot ) [ ]? {_POWER_OF_TEN % "power"}
        )?
    )
"""
NUMBER = re.compile(_NUMBER, re.VERBOSE)
MARKED = re.compile(
    rf"""
    \#\#\#\#
    (?: [^\w\#] | _ | \b (?i: the|final|answer|is|about|roughly|usd|us|eur|gbp|inr|rs|[a-z] ) \b )*?
    (?: (?P<minus_apart>{_MINUS}) [ ] )? {_NUMBER}
    """,
    re.VERBOSE,
)
FRACTION = re.compile(
    r"(\d?) (?: \\[dtc]?frac \s* (?: \{(-?\d+)\} | (\d) ) \s* (?: \{(\d+)\} | (\d) ) | ([¼-¾⅐-⅞]) )",
    re.VERBOSE,
)
EXPONENT = re.compile(
    rf"""
    (?<=[^\W\d_]) \*\* \d+ (?![\d*])
    | (?: (?<=[^\W\d_]) | (?<=[)}}]) ) \^ (?: {_MINUS}? \d+ | \{{ {_MINUS}? \d+ \}} )
    | (?: (?<=\d[cdkm]m) | (?<=\dm) | (?<=\d[ ][cdkm]m) | (?<=\d[ ]m) | (?<=\d[ ](?:ft|in|yd|mi)) ) [23] \b
    | (?: (?<=/[cdkm]m) | (?<=/[hms]) | (?<=\bper[ ]m) | (?<=\bper[ ][cdkm]m) ) [23] \b
    """,
    re.VERBOSE,
)
"""The power of a unit or a variable, as in m^2, which is not a number of its own."""
RAISED = re.compile("(?<=10)[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")

EXACT = Context(prec=1000, traps=[InvalidOperation])


def score(prediction: Any, target: Any, *, tolerance: float | str = 0) -> bool:
    """Return whether the numbers are equal, in decimal arithmetic, or differ by `tolerance` at most.

    A number is read as a person reads it in an English text:

    - It may have a sign (-5, "= - 5", "negative 5", "is minus 5"), decimals, and the digits of any script. A
      minus after a word, a number or a bracket is none: the number of 10-5 is 5.
    - Separators group thousands (1,234; 1_234; 1'234; 1 234 with any space; LaTeX's 1{,}234), or lakhs and
      crores (1,00,000). A comma is not a decimal point, so 3,5 is two numbers, except after points that group
      thousands, as in 1.234,5; 1.234.567 has such points, 1.234 has decimals.
    - The power of a unit or a variable is none: the number of 25 cm^2, or 25 cm2, is 25.
    - 1e5, 1.5 x 10^5, 1.5*10**5, 1.5 \\times 10^{5} and 10⁵ have an exponent.
    - 1/2, 1 / 2, 2 1/2, ½, \\frac{1}{2} and \\frac12 are fractions. 03/05/2001 is three numbers.
    - A currency sign before it, marks such as ** or _ around it, and what follows it, such as a percent sign,
      a unit or a full stop, are ignored, so 50% is 50.
    - `####` marks the number that follows it, also after other signs, a new line or words such as "the answer
      is".

    Words (three, 2 million) and terms (3 + 4) are not calculated.

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
    text = RAISED.sub(
        lambda raised: "^" + unicodedata.normalize("NFKC", raised[0]),
        FRACTION.sub(_plain, text.replace("\u2044", "/")),
    )
    text = EXPONENT.sub("", text)
    match = MARKED.search(text)
    negative = match is not None and match["minus_apart"] is not None
    if match is None:
        for match in NUMBER.finditer(text):  # noqa: B007 - the last one
            pass
    if match is None:
        return None
    try:
        with localcontext(EXACT):
            value = _value(match)
            return value.copy_negate() if negative or match["minus"] else value
    except InvalidOperation:
        return None


def _plain(fraction: re.Match[str]) -> str:
    """Write ½ and LaTeX's fractions as 1/2."""
    before, top, digit, bottom, last, sign = fraction.groups()
    plain = (
        f"{top or digit}/{bottom or last}"
        if top or digit
        else unicodedata.normalize("NFKC", sign).replace("\u2044", "/")
    )
    return f"{before} {plain}" if before else plain


def _value(match: re.Match[str]) -> Decimal:
    if match["top"]:
        # A fraction by 0 has no value: it is infinite, or invalid, and equals no target.
        return Decimal(match["whole"] or 0) + Decimal(match["top"]) / Decimal(match["bottom"])
    if match["european"]:
        return Decimal(match["european"].replace(".", "").replace(",", "."))
    number = (match["number"] or "").replace("\u066b", ".")
    digits = "1" if match["tens"] else re.sub(r"[^\d.]", "", number)
    exponent = match["exponent"] or match["power"] or match["tens"] or "0"
    return Decimal(f"{digits}e{exponent.replace(chr(0x2212), '-')}")


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
