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
        ("colour", None),
        ("", None),
        ("x" * 100_000, None),
    ],
)
def test_what_is_near(name: str, meant: str | None) -> None:
    assert nearest(name, KNOWN) == meant
    assert question(name, KNOWN) == (f" Did you mean {meant!r}?" if meant else "")
