"""The number of an answer, as `numeric_match` reads it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.eventually import ends
from tests.validation.scoring import quick, score

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether <<48+24=72>>72 clips.\n#### 72"


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ("So the answer is 72.", GSM8K, True),
        ("#### 72\n\nQuestion: 5 apples and 6 pears?", GSM8K, True),
        ("#### 71, not 72", GSM8K, False),
        ("#### unknown, maybe 72", GSM8K, True),
        ("It costs $1,234.50!", "1234.5", True),
        ("1,234,567", 1234567, True),
        ("1, 2, 3", 3, True),
        ("1,2", 2, True),
        ("50%", 50, True),
        ("It is -5.", "-5", True),
        ("a loss of -$5", -5, True),
        ("a loss of $-5", -5, True),
        ("a loss of \u22125", -5, True),
        ("10-5", 5, True),
        ("from 3 to (-4)", -4, True),
        ("$.50", 0.5, True),
        ("wait...5", 5, True),
        ("0.1", 0.1, True),
        ("0.10", "0.1", True),
        ("0.30000000000000004", 0.3, False),
        ("1e3", 1000, True),
        ("\u0664\u0662", 42, True),
        ("no number", 1, False),
        ("", 1, False),
        (72, GSM8K, True),
        (72.0, 72, True),
        (1e23, "1e23", True),
        (float("nan"), 1, False),
        (True, 1, False),
        ("seven is 7", [6, 7], True),
        ("1e999999999", 1, False),
        ("1e99999999999999999999999", 1, False),
        ("1e-999999999", 0, False),
    ],
)
def test_numeric_match(prediction: Any, target: Any, expected: bool) -> None:
    """The number of an answer is the marked one or else the last one, in any notation."""
    assert score("numeric_match", prediction, target) is expected


@pytest.mark.parametrize(
    ("prediction", "tolerance", "expected"),
    [
        ("0.31", 0.01, True),
        ("0.310000001", 0.01, False),
        ("0.29", "0.01", True),
        ("1e999999999", 1e300, False),
        ("-1e999999999", 0.5, False),
    ],
)
def test_tolerance_is_decimal(prediction: str, tolerance: float | str, expected: bool) -> None:
    """0.31 is within 0.01 of 0.3, which binary fractions deny."""
    assert score("numeric_match", prediction, 0.3, tolerance=tolerance) is expected


@pytest.mark.parametrize(
    "text",
    [
        "9" * 1_000_000,
        "1," * 500_000,
        "1,234" * 200_000,
        "123,456," * 120_000 + "7890",
        "1." * 500_000,
        "-" * 1_000_000,
        "1e" * 500_000,
        "#" * 500_000 + " " * 500_000,
        "#### " * 200_000,
        "####" + " " * 1_000_000,
        "$" * 1_000_000,
        "12,34," * 200_000,
        "1/" * 500_000,
        "1 " * 500_000,
        "####" + "a " * 500_000,
        "#### " + "- " * 300_000,
        "10^" * 300_000,
        "100 " * 300_000,
        "100." * 300_000,
        "negative " * 100_000,
        "\\frac " * 200_000,
        "\\frac" + " " * 1_000_000,
        "m^" * 500_000,
        "1.234" * 200_000,
        "1.234." * 160_000,
    ],
    ids=lambda text: repr(text[:9]),
)
def test_numbers_are_read_in_linear_time(text: str) -> None:
    """A megabyte that looks like the beginning of a number would take hours if every place began it anew."""
    with ends():
        assert not score("numeric_match", text, 5, tolerance=0.1)


@quick
@given(
    number=st.decimals(allow_nan=False, allow_infinity=False, places=3),
    before=st.sampled_from(["", "= ", "$"]),
)
def test_a_number_matches_itself_in_any_dress(number: Any, before: str) -> None:
    """Separators and a currency sign change nothing."""
    assert score("numeric_match", f"1 and 2, so {before}{number:,f}.", f"{number:f}")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # Signs
        ("#### +18 and then 3", "18"),
        ("#### - 18 or 3", "-18"),
        ("it is -$ 5", "-5"),
        (r"it is -\$5", "-5"),
        ("I say \u20135", "-5"),
        ("pages 3\u20135", "5"),
        ("5 - 3 = 2", "2"),
        ("3 - 8 = - 5", "-5"),
        ("it is negative 5", "-5"),
        ("it is minus 5", "-5"),
        ("Minus 5 degrees", "-5"),
        ("#### minus 5 or 3", "-5"),
        ("10 minus 5", "5"),
        ("the total minus 7", "7"),
        ("25 m2", "25"),
        ("10 000 km2", "10000"),
        ("9.8 m/s2", "9.8"),
        ("120 people per km2", "120"),
        ("5 ft3", "5"),
        ("m2 = 7", "7"),
        ("- 5 apples", "5"),
        # What may stand between the mark and its number
        ("#### $ 5 then 7", "5"),
        ("#### ~5 then 7", "5"),
        ("#### \u2248 5 then 7", "5"),
        ("#### = 5. Then 7", "5"),
        ("#### x = 5 of 7", "5"),
        ("####\n5 then 7", "5"),
        ("####\n\n**5** then 7", "5"),
        ("#### **18** of 20", "18"),
        ("#### US$ 5 of 7", "5"),
        ("#### Rs. 5 of 7", "5"),
        ("#### The answer is 5, not 7", "5"),
        ("#### Step 1: add\n#### 7 of 8", "7"),
        # Marks around it
        ("it is _-5_", "-5"),
        ("it is **-5**", "-5"),
        ("it is `5`", "5"),
        # Separators
        ("1_000", "1000"),
        ("1'000", "1000"),
        ("1\u202f000", "1000"),
        ("1{,}000", "1000"),
        ("#### 1,00,000", "100000"),
        ("so it is 12,34,567.5 in all", "1234567.5"),
        ("from 10,20", "20"),
        ("it is 10 000.", "10000"),
        ("1 234 567 in all", "1234567"),
        ("in 2019 300 came", "300"),
        ("2 100-piece sets", "100"),
        ("1 2 300", "300"),
        ("100 200 30", "30"),
        ("1.000.000", "1000000"),
        ("1.234,5", "1234.5"),
        ("1.234,56 and 3.141", "3.141"),
        ("it is 1.234", "1.234"),
        ("version 1.2.3", "3"),
        ("\uff11\uff0c\uff10\uff10\uff10", "1000"),
        ("\u0661\u066c\u0662\u0663\u0664\u066b\u0665", "1234.5"),
        ("it is 1.234,5.", "1234.5"),
        ("-1.234.567,89", "-1234567.89"),
        ("at (1.234,5.678)", "5.678"),
        ("0.500,5", "5"),
        # Fractions
        ("1/2", "0.5"),
        ("1\u20442", "0.5"),
        ("-1/2", "-0.5"),
        ("2 1/2", "2.5"),
        ("-2\u00bd", "-2.5"),
        ("\u2153", "1/3"),
        (r"2\frac{1}{2} m", "2.5"),
        ("2/6", "1/3"),
        ("it is 1 / 2", "0.5"),
        (r"\frac12", "0.5"),
        (r"\dfrac{-3}{4}", "-0.75"),
        (r"1\tfrac 3{16}", "1.1875"),
        ("03 / 05 / 2001", "2001"),
        ("1/3", "0.333"),
        ("03/05/2001", "2001"),
        # Percent
        ("50 %", "50"),
        ("12 1/2%", "12.5"),
        # Powers of ten
        ("1.5 x 10^5", "150000"),
        ("1.5*10**5", "150000"),
        (r"-1.5 \times 10^{-2}", "-0.015"),
        ("3 \u00d7 10\u207b\u00b2", "0.03"),
        ("10^5", "100000"),
        ("2 x 10 = 20", "20"),
        # Powers of units and variables
        ("the area is 25 cm^2", "25"),
        (r"#### 25 \text{ cm}^{2}", "25"),
        (r"$25 \text{ cm}^{-2}$", "25"),
        ("25 m**2", "25"),
        ("5*x^2", "5"),
        ("the answer is **42**", "42"),
        ("it is**42**", "42"),
    ],
)
def test_a_number_is_read_as_a_person_reads_it(text: str, number: str) -> None:
    """Signs, marks, separators, fractions, percent and powers are part of the number's notation."""
    assert score("numeric_match", text, number) is (number != "0.333")
    assert not score("numeric_match", text, "977")


def test_a_fraction_by_zero_is_no_number_of_a_target() -> None:
    """It has no value, so no answer with a number equals it."""
    assert not score("numeric_match", "24/0", 24, tolerance=1e9)
