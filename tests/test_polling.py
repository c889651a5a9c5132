"""The reactor's polling, on reactors of its own: what Twisted's does, and no more."""

import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from secrets import token_hex

import pytest
from _plain import Transport
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.protocol import ClientFactory, Protocol, connectionDone
from twisted.internet.selectreactor import SelectReactor
from twisted.logger import LogEvent
from twisted.python.failure import Failure

from vllmproxy.polling import lighten
from vllmproxy.turn import turn


@pytest.fixture
def reactor() -> Iterator[EPollReactor]:
    made = EPollReactor()
    lighten(made)
    yield made
    made.removeAll()
    made._poller.close()


class Descriptor:
    """One end of a pair of sockets; ``peer`` is the other."""

    def __init__(self, reads: Callable[[], object] = lambda: None) -> None:
        self.sock, self.peer = socket.socketpair()
        self._reads = reads
        self.read = 0
        self.written = 0
        self.lost: list[Failure] = []

    def fileno(self) -> int:
        return self.sock.fileno()

    def doRead(self) -> object:
        self.read += 1
        self.sock.recv(100)
        return self._reads()

    def doWrite(self) -> None:
        self.written += 1

    def connectionLost(self, reason: Failure) -> None:
        self.lost.append(reason)
        self.sock.close()

    def logPrefix(self) -> str:
        raise AssertionError("nobody asks for it")


def test_what_can_be_read_is_read(reactor: EPollReactor) -> None:
    one, silent = Descriptor(), Descriptor()
    reactor.addReader(one)
    reactor.addReader(silent)
    one.peer.send(b"x")
    reactor.doIteration(1)
    reactor.doIteration(0)
    assert (one.read, silent.read, one.lost) == (1, 0, [])


def test_what_can_be_written_is_written(reactor: EPollReactor) -> None:
    one = Descriptor()
    reactor.addWriter(one)
    reactor.doIteration(1)
    assert (one.written, one.read) == (1, 0)


def test_one_that_says_why_it_ends_is_lost(reactor: EPollReactor) -> None:
    one = Descriptor(ConnectionDone)
    reactor.addReader(one)
    one.peer.send(b"x")
    reactor.doIteration(1)
    assert [reason.type for reason in one.lost] == [ConnectionDone]
    assert one not in reactor.getReaders()


def test_one_that_raises_is_logged_and_lost_and_no_other(reactor: EPollReactor, logged_errors: list[LogEvent]) -> None:
    def fail() -> None:
        raise KeyError("broken")

    broken, sound = Descriptor(fail), Descriptor()
    for each in (broken, sound):
        reactor.addReader(each)
        each.peer.send(b"x")
    reactor.doIteration(1)
    reactor.doIteration(0)
    assert (sound.read, sound.lost) == (1, [])
    assert [reason.type for reason in broken.lost] == [KeyError]
    assert len(logged_errors) == 1
    logged_errors.clear()


def test_one_that_raises_when_it_is_lost_holds_up_no_other(
    reactor: EPollReactor, logged_errors: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Descriptor, reason: Failure) -> None:
        raise KeyError("broken")

    monkeypatch.setattr(Descriptor, "connectionLost", fail)
    both = [Descriptor(ConnectionDone), Descriptor(ConnectionDone)]
    for each in both:
        reactor.addReader(each)
        each.peer.send(b"x")
    reactor.doIteration(1)
    assert [each.read for each in both] == [1, 1]
    assert len(logged_errors) == 2
    logged_errors.clear()


def test_one_that_another_has_ended_is_left_alone(reactor: EPollReactor) -> None:
    both: list[Descriptor] = []

    def end_the_other() -> None:
        for each in both:
            reactor.removeReader(each)

    both += Descriptor(end_the_other), Descriptor(end_the_other)
    for each in both:
        reactor.addReader(each)
        each.peer.send(b"x")
    reactor.doIteration(1)
    assert sum(each.read for each in both) == 1


def test_what_is_yet_to_be_acted_on_is_told(reactor: EPollReactor) -> None:
    told: list[set[int]] = []
    both = [Descriptor(lambda: told.append(set(turn.told))) for _ in range(2)]
    for each in both:
        reactor.addReader(each)
        each.peer.send(b"x")
    reactor.doIteration(1)
    first, last = told
    assert len(first) == 1
    assert first < {each.fileno() for each in both}
    assert last == set()


def test_each_poll_has_a_number(reactor: EPollReactor) -> None:
    numbers: list[int] = []
    one = Descriptor(lambda: numbers.append(turn.number))
    reactor.addReader(one)
    for _ in range(2):
        one.peer.send(b"x")
        reactor.doIteration(1)
    assert numbers[0] < numbers[1]


def test_what_is_to_be_done_before_anything_leaves_is_done_before_twisteds_own_queues(reactor: EPollReactor) -> None:
    done: list[str] = []
    first, last = Descriptor(), Descriptor()
    for each in (first, last):
        each.doRead = lambda: turn.before_writing(lambda: done.append("prepared"))  # type: ignore[method-assign]
        each.doWrite = lambda: done.append("left")  # type: ignore[method-assign]
        reactor.addReader(each)
        each.peer.send(b"x")
    reactor.addWriter(first)
    reactor.addWriter(last)
    reactor.doIteration(1)
    assert done.count("left") == 2
    assert done.index("prepared") < len(done) - 1 - done[::-1].index("left")


def test_another_reactor_is_left_as_it_is() -> None:
    other = SelectReactor()
    before = other.doIteration
    lighten(other)
    assert other.doIteration == before


class Told(Protocol):
    """Keeps what it is told, in order."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.fails = False

    def connectionMade(self) -> None:
        self.told.append("made")

    def dataReceived(self, data: bytes) -> None:
        self.told.append(data)
        if self.fails:
            raise KeyError("broken")

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.told.append(reason.type)


@contextmanager
def connected(reactor: EPollReactor, end: str) -> Iterator[tuple[Told, socket.socket]]:
    """A protocol on the server's or the client's end of a TCP connection, or on a UNIX socket's server's, and
    the socket at the other end."""
    told, factory = Told(), ClientFactory()
    factory.noisy = False
    factory.buildProtocol = lambda _: told  # type: ignore[method-assign,assignment]
    with ExitStack() as stack:
        if end == "unix":
            name = f"\0vllmproxy-test-{token_hex(8)}"
            stack.callback(reactor.listenUNIX(name, factory).stopListening)
            peer = stack.enter_context(socket.socket(socket.AF_UNIX))
            peer.connect(name)
        elif end == "server":
            port = reactor.listenTCP(0, factory, interface="127.0.0.1")
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", port.getHost().port)))
        else:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            reactor.connectTCP("127.0.0.1", listener.getsockname()[1], factory)
            reactor.runUntilCurrent()
            peer = stack.enter_context(listener.accept()[0])
            peer.send(b"at once")
        turns(reactor, lambda: bool(told.told))
        yield told, peer


def turns(reactor: EPollReactor, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        reactor.runUntilCurrent()
        reactor.doIteration(0.01)


@pytest.mark.parametrize(
    ("end", "how"),
    [*product(["server", "client"], ["fin", "reset", "broken"]), ("unix", "fin"), ("unix", "broken")],
)
def test_connections_are_read_as_by_twisted(
    reactor: EPollReactor, end: str, how: str, logged_errors: list[LogEvent]
) -> None:
    with connected(reactor, end) as (told, peer):
        peer.send(b"hello")
        turns(reactor, lambda: b"hello" in b"".join(each for each in told.told if isinstance(each, bytes)))
        if how == "fin":
            peer.close()
        elif how == "reset":
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
        else:
            told.fails = True
            peer.send(b"more")
        turns(reactor, lambda: isinstance(told.told[-1], type))
    assert told.told[0] == "made"
    assert told.told[-1] is {"fin": ConnectionDone, "reset": ConnectionLost, "broken": KeyError}[how]
    assert len(logged_errors) == (how == "broken")
    logged_errors.clear()


class Poller:
    """Epoll, as it tells of a reset or a FIN that it looks at while the kernel is noting it: not yet readable."""

    def __init__(self, poller: select.epoll, hidden: int) -> None:
        self._poller = poller
        self._hidden = hidden

    def __getattr__(self, name: str) -> object:
        return getattr(self._poller, name)

    def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
        events = self._poller.poll(timeout, most)
        return [(fd, event & ~self._hidden if event & select.EPOLLHUP else event) for fd, event in events]


@pytest.mark.parametrize("hidden", [select.EPOLLIN | select.EPOLLHUP, select.EPOLLIN | select.EPOLLRDHUP])
@pytest.mark.parametrize("end", ["server", "client"])
def test_a_reset_is_none_the_less_one_where_nothing_can_be_read_yet(
    reactor: EPollReactor, end: str, hidden: int
) -> None:
    with connected(reactor, end) as (told, peer):
        poller = reactor._poller
        reactor._poller = Poller(poller, hidden)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.send(b"the last of it")
        peer.close()
        turns(reactor, lambda: isinstance(told.told[-1], type))
        reactor._poller = poller
    assert b"".join(each for each in told.told if isinstance(each, bytes)).endswith(b"the last of it")
    assert told.told[-1] is ConnectionLost


class Running:
    """A reactor that runs, until what a test waits for has come."""

    def __init__(self, reactor: EPollReactor) -> None:
        self.reactor = reactor
        self.turns = 0
        self._poll = reactor.doIteration
        reactor.doIteration = self._count  # type: ignore[method-assign]

    def _count(self, timeout: float | None) -> None:
        self.turns += 1
        self._poll(timeout)

    def run(self) -> None:
        self.reactor.callLater(20, self.reactor.stop)  # a hang would be none of the test's
        self.reactor.run(installSignalHandlers=False)


def test_events_are_acted_on_in_one_turn_while_nothing_else_is_due(reactor: EPollReactor) -> None:
    running = Running(reactor)
    count = 0

    def again() -> None:
        nonlocal count
        count += 1
        if count < 50:
            one.peer.send(b"x")
        else:
            reactor.removeReader(one)
            reactor.stop()

    one = Descriptor(again)
    reactor.addReader(one)
    one.peer.send(b"x")
    running.run()
    assert count == 50
    assert running.turns < 10


@pytest.mark.parametrize("how", ["new", "sooner", "thread", "stop"])
def test_what_an_event_makes_due_is_done_before_others_come(reactor: EPollReactor, how: str) -> None:
    later = reactor.callLater(20, reactor.stop)

    def act() -> None:
        reactor.removeReader(one)
        if how == "new":
            reactor.callLater(0, reactor.stop)
        elif how == "sooner":
            later.reset(0)
        elif how == "thread":
            reactor.threadCallQueue.append((reactor.stop, (), {}))
        else:
            reactor.stop()

    one = Descriptor(act)
    reactor.addReader(one)
    one.peer.send(b"x")
    began = reactor.seconds()
    Running(reactor).run()
    assert one.read == 1
    assert reactor.seconds() - began < 15


@pytest.mark.parametrize("events", [1, 2])
def test_what_several_events_write_is_written_when_all_are_acted_on(reactor: EPollReactor, events: int) -> None:
    out = Transport()
    seen: list[list[bytes]] = []

    def act() -> None:
        turn.write(out, b"x")
        seen.append(list(out.writes))

    for _ in range(events):
        each = Descriptor(act)
        reactor.addReader(each)
        each.peer.send(b"x")
    reactor.doIteration(1)
    assert seen == ([[b"x"]] if events == 1 else [[], []])
    assert out.writes == [b"x" * events]
