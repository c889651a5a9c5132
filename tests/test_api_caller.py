import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress
from twisted.web.test.requesthelper import DummyRequest

from vllmproxy.api.caller import is_local


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (IPv4Address("TCP", "127.0.0.1", 1), True),
        (IPv4Address("TCP", "127.9.9.9", 1), True),
        (IPv6Address("TCP", "::1", 1), True),
        # What an IPv4 client looks like on a dual-stack socket.
        (IPv6Address("TCP", "::ffff:127.0.0.1", 1), True),
        (IPv6Address("TCP", "::ffff:192.0.2.1", 1), False),
        (IPv6Address("TCP", "fe80::1%eth0", 1), False),
        (IPv4Address("TCP", "192.0.2.1", 1), False),
        # Behind a UNIX socket there is as a rule another proxy.
        (UNIXAddress(b"/run/x"), False),
    ],
)
def test_local_is_loopback(peer: IAddress, expected: bool) -> None:
    request = DummyRequest([b"metrics"])
    request.client = peer
    assert is_local(request) is expected


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via"])
def test_a_forwarded_request_is_not_local_even_with_an_empty_header(header: str) -> None:
    request = DummyRequest([b"metrics"])
    request.client = IPv4Address("TCP", "127.0.0.1", 1)
    request.requestHeaders.addRawHeader(header, "")
    assert not is_local(request)
