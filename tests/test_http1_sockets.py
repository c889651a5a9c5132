"""What is read of and written to real sockets below Twisted's transports."""

import socket
from collections.abc import Iterator

import pytest
from _asking import until

from vllmproxy.http1.sockets import delivery


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
    assert after.segments > before.segments


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
    assert after.segments > before.segments


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
