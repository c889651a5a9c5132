from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.keys.durations import MAXIMUM, seconds_of

NOW = datetime(2025, 1, 31, 12, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("-1", None),
        ("30s", 30),
        ("30m", 1800),
        ("30h", 108_000),
        ("30d", 2_592_000),
        ("2w", 1_209_600),
        ("1mo", 28 * 86_400),
        ("12mo", 365 * 86_400),
        ("13mo", (365 + 28) * 86_400),
        ("1200mo", 36_524 * 86_400),
    ],
)
def test_known(text: str | None, seconds: int | None) -> None:
    assert seconds_of(text, NOW) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "30",
        "s",
        "-30s",
        "1.5h",
        "30 s",
        " 30s",
        "30S",
        "30s\n",
        "1y",
        "0s",
        "0mo",
        "99999999d",
        "9999mo",
        "٣s",
    ],
)
def test_bad(text: str) -> None:
    with pytest.raises(ValueError, match="a duration is") as caught:
        seconds_of(text, NOW)
    assert "\n" not in str(caught.value)


@given(st.text(alphabet="0123456789smhdwo", max_size=16))
def test_anything_is_a_bounded_number_or_a_sentence(text: str) -> None:
    try:
        seconds = seconds_of(text, NOW)
    except ValueError:
        return
    assert seconds is not None
    assert 0 < seconds <= MAXIMUM
