"""What somebody may have meant."""

import pytest

from vllmproxy.near import nearest, question

KNOWN = ("key_alias", "end_user", "rpm_limit", "idle-timeout")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("end-user", "end_user"),
        ("alias", "key_alias"),
        ("IDLE_TIMEOUT", "idle-timeout"),
        ("rpm_limits", "rpm_limit"),
        ("rpm", "rpm_limit"),
        ("RPM_", "rpm_limit"),
        ("end", "end_user"),
        ("key", "key_alias"),
        ("rp", None),
        ("colour", None),
        ("", None),
        ("x" * 100_000, None),
    ],
)
def test_what_is_near(name: str, meant: str | None) -> None:
    assert nearest(name, KNOWN) == meant
    assert question(name, KNOWN) == (f" Did you mean {meant!r}?" if meant else "")


def test_what_begins_two_of_them_is_near_none() -> None:
    assert nearest("end", ("end_user", "end_of_day")) is None
