"""Seconds as text, with six digits behind the point."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllmproxy.decimals import decimal


@given(st.floats(-1e10, 1e12) | st.integers(0, 2**52).map(lambda micros: micros / 1e6))
@example(0.0)
@example(0.9999995)
@example(4400194585.816876)
@example(5584740269.710381)
def test_it_is_the_nearest_and_is_read_as_what_it_was(seconds: float) -> None:
    text = decimal(seconds)
    whole, digits = text.split(".")
    assert whole in (str(int(whole)), "-0")
    assert len(digits) == 6
    assert abs(float(text) - seconds) <= 5e-7 + 2 * math.ulp(seconds)
    assert decimal(float(text)) == (text if float(text) else "0.000000")


@pytest.mark.parametrize("seconds", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_is_said(seconds: float) -> None:
    assert decimal(seconds) == str(seconds)
