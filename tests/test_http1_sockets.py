"""What is read of real sockets below Twisted's transports, and what that tells of a request."""

import socket
from collections.abc import Iterator
from functools import partial

import pytest
from _asking import until
from twisted.internet.task import Clock

from vllmproxy.http1.fate import Fate, Verdict, fate_of
from vllmproxy.http1.sockets import Delivery, delivery

#: Of a new connection: Linux counts the SYN.
_FIRST = Delivery(acknowledged=1, sent=0)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    yield ours, theirs
    ours.close()
    theirs.close()


def acknowledged(sock: socket.socket) -> int:
    known = delivery(sock)
    assert known is not None
    return known.acknowledged


def test_a_byte_that_the_peers_kernel_took_counts(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = pair
    before = delivery(ours)
    assert before is not None
    ours.sendall(b"x" * 1000)
    until(lambda: acknowledged(ours) == before.acknowledged + 1000)
    after = delivery(ours)
    assert after is not None
    assert after.sent > before.sent


def test_none_counts_when_the_peer_had_closed_before(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.sendall(b"first")
    assert theirs.recv(5) == b"first"
    until(lambda: acknowledged(ours) == 5 + 1)  # Linux counts the SYN
    before = delivery(ours)
    assert before is not None
    theirs.close()
    ours.sendall(b"second")
    until(lambda: _reset(ours))
    after = delivery(ours)
    assert after is not None
    assert after.acknowledged == before.acknowledged
    assert after.sent > before.sent


def _reset(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 7  # TCP_CLOSE


def test_a_fin_confirms_what_the_peer_read(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.sendall(b"first")
    theirs.recv(5)
    theirs.sendall(b"answer")
    ours.recv(6)
    before = acknowledged(ours)
    ours.sendall(b"second")
    assert theirs.recv(6) == b"second"
    theirs.close()
    assert ours.recv(1) == b""
    assert acknowledged(ours) == before + 6


def test_nothing_is_known_of_other_sockets() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert delivery(ours) is None
    assert delivery(None) is None
    closed = socket.socket()
    closed.close()
    assert delivery(closed) is None


@pytest.mark.parametrize(
    ("now", "orderly", "fate"),
    [
        (Delivery(501, 500, closed=True), False, Fate.UNSEEN),
        (Delivery(401, 450, closed=True), False, Fate.UNSEEN),
        (Delivery(501, 500), False, Fate.UNKNOWN),  # it is in the kernel, which may send it yet
        (Delivery(401, 450), True, Fate.OPEN),
        (Delivery(501, 501, closed=True), False, Fate.UNKNOWN),
        (Delivery(501, 501), True, Fate.OPEN),
        (Delivery(501, 600, closed=True), True, Fate.UNSEEN),
        (Delivery(502, 600), True, Fate.UNKNOWN),
        (Delivery(502, 600, closed=True), True, Fate.UNKNOWN),
    ],
)
def test_what_was_given_before_a_request_is_none_of_it(now: Delivery, orderly: bool, fate: Fate) -> None:
    assert fate_of(_FIRST, 500, now, orderly=orderly) is fate


def _wait_for_all_of(sock: socket.socket, given: int) -> None:
    until(lambda: acknowledged(sock) == _FIRST.acknowledged + given)


def test_requests_on_one_connection_are_told_apart(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    verdict = Verdict(Clock(), partial(delivery, ours))
    verdict.open()
    given = 0
    for number in range(3):
        verdict.begin(reused=number > 0, given=given)
        assert verdict.pronounce() is Fate.UNKNOWN  # it may be sent yet
        request = b"x" * 1000 * (number + 1)
        ours.sendall(request)
        given += len(request)
        _wait_for_all_of(ours, given)
        assert verdict.pronounce() is Fate.UNKNOWN
    verdict.begin(reused=True, given=given)
    theirs.recv(10_000)
    theirs.close()
    ours.sendall(b"too late")
    until(lambda: _reset(ours))
    judged: list[bool] = []
    verdict.after_fin(lambda: judged.append(verdict.unseen), wanted=True)
    assert judged == [True]
