"""Who can reach a listener, and what follows from it."""

import os

import pytest
from twisted.internet.address import HostnameAddress, IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress

from vllmproxy.exposure import is_local, judge, judge_start
from vllmproxy.settings import Secret, load

LOOPBACK = IPv4Address("TCP", "127.0.0.1", 4000)
EVERYWHERE = IPv4Address("TCP", "0.0.0.0", 4000)
STRONG = Secret("sk-0f1e6c6a9b5d43e0a7c2f8d1")
WEAK = Secret("sk-1234")


@pytest.mark.parametrize(
    ("address", "local"),
    [
        (LOOPBACK, True),
        (IPv4Address("TCP", "127.255.0.7", 1), True),
        (IPv6Address("TCP", "::1", 1), True),
        (IPv6Address("TCP", "::ffff:127.0.0.1", 1), True),
        (UNIXAddress("/run/vllmproxy.sock"), True),
        (UNIXAddress(None), True),
        (EVERYWHERE, False),
        (IPv4Address("TCP", "10.0.0.1", 1), False),
        (IPv4Address("TCP", "128.0.0.1", 1), False),
        (IPv6Address("TCP", "::", 1), False),
        (IPv6Address("TCP", "::ffff:10.0.0.1", 1), False),
        (IPv6Address("TCP", "fe80::1%eth0", 1), False),
        (IPv4Address("TCP", "localhost", 1), False),
        (HostnameAddress(b"localhost", 1), False),
    ],
)
def test_is_local(address: IAddress, local: bool) -> None:
    assert is_local(address) is local


@pytest.mark.parametrize(
    ("addresses", "master_key", "open", "refused", "warned"),
    [
        ([LOOPBACK], STRONG, False, False, False),
        ([EVERYWHERE], STRONG, False, False, False),
        ([EVERYWHERE], STRONG, True, False, False),
        ([LOOPBACK], None, False, False, True),
        ([LOOPBACK], None, True, False, True),
        ([EVERYWHERE], None, False, True, False),
        ([LOOPBACK, EVERYWHERE], None, False, True, False),
        ([EVERYWHERE], None, True, False, True),
        ([], None, False, True, False),
        ([LOOPBACK], WEAK, False, False, True),
        ([EVERYWHERE], WEAK, False, True, False),
        ([EVERYWHERE], WEAK, True, True, False),
        ([LOOPBACK, EVERYWHERE], WEAK, True, True, False),
    ],
)
def test_judge(addresses: list[IAddress], master_key: Secret | None, open: bool, refused: bool, warned: bool) -> None:
    verdict = judge(addresses, master_key=master_key, open=open)
    assert (verdict.refusal is not None, bool(verdict.warnings)) == (refused, warned)


def test_a_refusal_names_the_address_and_the_remedy_and_never_the_key() -> None:
    addresses = [LOOPBACK, EVERYWHERE, IPv6Address("TCP", "::", 4001)]
    without = judge(addresses, master_key=None, open=False).refusal
    weak = judge(addresses, master_key=WEAK, open=True).refusal
    assert without is not None
    assert weak is not None
    assert "--master-key-file" in without
    assert "--open" in without
    for text in (without, weak):
        assert "0.0.0.0:4000, [::]:4001" in text
        assert "127.0.0.1:4000" not in text
        assert "sk-1234" not in text
        assert "\n" not in text


def test_auth_off_for_everybody_is_shouted() -> None:
    (warning,) = judge([EVERYWHERE], master_key=None, open=True).warnings
    assert warning.startswith("AUTH IS OFF AND 0.0.0.0:4000")


def test_a_directory_that_is_not_ours_to_read_keeps_nobody_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store in memory needs none."""

    def forbidden(path: object, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    settings = load({"upstream": "http://gpu1:8000", "state-directory": "/root/x", "store": "memory:"}, {})
    monkeypatch.setattr(os, "stat", forbidden)
    judge_start([IPv4Address("TCP", "127.0.0.1", 4000)], settings)
