"""A peer's end is noticed behind bytes that nobody reads, on real sockets."""

import socket
import struct
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from twisted.python.failure import Failure

from vllmproxy.http1.hangup import HangupWatcher


class Reactor:
    """Polls its one reader when told to."""

    def __init__(self) -> None:
        self.readers: list[Any] = []

    def addReader(self, reader: Any) -> None:
        self.readers.append(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.remove(reader)


@pytest.fixture
def watcher() -> Iterator[HangupWatcher]:
    reactor: Any = Reactor()
    made = HangupWatcher(reactor)
    assert reactor.readers == [made]
    yield made
    made.close()
    assert not reactor.readers


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    return ours, theirs


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("how", ["fin", "half", "rst"])
@pytest.mark.parametrize("before", [True, False])
def test_a_peer_that_ends_behind_unread_bytes(how: str, before: bool, watcher: HangupWatcher) -> None:
    ours, theirs = pair()
    calls: list[int] = []
    theirs.sendall(b"unread")
    if not before:
        watcher.watch(ours.fileno(), lambda: calls.append(1))
        watcher.doRead()
        assert not calls
    if how == "rst":
        reset(theirs)
    elif how == "half":
        theirs.shutdown(socket.SHUT_WR)
    else:
        theirs.close()
    if before:
        watcher.watch(ours.fileno(), lambda: calls.append(1))
    watcher.doRead()
    assert calls == [1]
    watcher.doRead()
    assert calls == [1]
    watcher.watch(ours.fileno(), lambda: calls.append(2))  # asked anew, told anew
    watcher.doRead()
    assert calls == [1, 2]
    ours.close()
    theirs.close()


def test_bytes_alone_say_nothing(watcher: HangupWatcher) -> None:
    ours, theirs = pair()
    calls: list[int] = []
    watcher.watch(ours.fileno(), lambda: calls.append(1))
    theirs.sendall(b"x" * 10_000)
    watcher.doRead()
    watcher.forget(ours.fileno())
    theirs.close()
    watcher.doRead()
    assert not calls
    ours.close()


@pytest.mark.parametrize("forget_first", [True, False])
def test_a_number_that_is_used_again(forget_first: bool, watcher: HangupWatcher) -> None:
    """Twisted closes the socket before the protocol hears of it: forgetting afterwards has to do as well."""
    ours, theirs = pair()
    calls: list[str] = []
    fd = ours.fileno()
    watcher.watch(fd, lambda: calls.append("old"))
    if forget_first:
        watcher.forget(fd)
        ours.close()
    else:
        ours.close()
        watcher.forget(fd)
    again, their_new = pair()
    while again.fileno() != fd and their_new.fileno() != fd:
        again, their_new = pair()
    mine, other = (again, their_new) if again.fileno() == fd else (their_new, again)
    watcher.watch(fd, lambda: calls.append("new"))
    theirs.close()
    watcher.doRead()
    assert not calls
    other.close()
    watcher.doRead()
    assert calls == ["new"]
    mine.close()


def test_one_call_may_forget_another(watcher: HangupWatcher) -> None:
    pairs = [pair() for _ in range(3)]
    calls: list[int] = []

    def hung_up(fd: int) -> None:
        calls.append(fd)
        for ours, _ in pairs:
            watcher.forget(ours.fileno())

    for ours, theirs in pairs:
        watcher.watch(ours.fileno(), partial(hung_up, ours.fileno()))
        theirs.close()
    watcher.doRead()
    assert len(calls) == 1
    for ours, _ in pairs:
        ours.close()


def test_forgetting_what_is_not_watched(watcher: HangupWatcher) -> None:
    watcher.forget(12345)
    watcher.connectionLost(Failure(ValueError()))
    assert watcher.logPrefix()
