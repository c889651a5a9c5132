"""Values as text for a terminal."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.cli.text import field_text, moment, money, plain, status_of, whole_number, without_keys

NOW = datetime(2026, 11, 26, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("bob", "bob"),
        ("Zoë 日本 🙂", "Zoë 日本 🙂"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202egnp", "\\u202egnp"),
        ("\udc80", "\\udc80"),
    ],
)
def test_what_does_not_print_is_shown_escaped(text: str, shown: str) -> None:
    assert plain(text) == shown


@given(st.text())
def test_plain_text_always_prints(text: str) -> None:
    assert plain(text).isprintable()
    assert plain(plain(text)) == plain(text)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists))
def test_whatever_a_field_holds_prints(value: object) -> None:
    for name in ("expires", "metadata"):
        assert field_text(name, value).isprintable()
    for show in (money, moment, whole_number):
        assert show(value).isprintable()


def test_numbers() -> None:
    assert [whole_number(value) for value in (0, 1234567, None)] == ["0", "1,234,567", ""]
    assert [money(value) for value in (0.0, 1234.5, 0.00001, None)] == ["0.0000", "1,234.5000", "<0.0001", ""]


def test_times_are_in_utc() -> None:
    assert moment("2026-11-26T05:21:44.123Z") == "2026-11-26 05:21"
    assert moment("2026-11-26T05:21:44+02:00") == "2026-11-26 03:21"
    assert moment("soon") == "soon"
    assert field_text("expires", "2026-11-26T05:21:44.123Z") == "2026-11-26 05:21:44 UTC"


def test_zero_is_a_value_and_nothing_is_none() -> None:
    assert field_text("rpm_limit", 0) == "0"
    assert [field_text("x", value) for value in (None, "", [], {}, False)] == [""] * 5
    assert field_text("models", ["a", "b"]) == "a, b"
    assert field_text("metadata", {"a": [1]}) == '{"a": [1]}'


def test_what_a_key_is() -> None:
    assert status_of({}, NOW) == "active"
    assert status_of({"expires": "2026-11-26T00:00:01Z"}, NOW) == "active"
    assert status_of({"expires": "2026-11-26T00:00:00Z"}, NOW) == "expired"
    assert status_of({"expires": "2026-11-25T00:00:00Z", "blocked": True}, NOW) == "blocked"


def test_keys_are_taken_out() -> None:
    assert without_keys("no sk-0123456789abcdef here") == "no sk-... here"
    assert without_keys("sk-...cdef and sk- too") == "sk-...cdef and sk- too"
