"""Twisted's epoll, without the things that it does for each event and nobody here needs.

For each descriptor that can be read or written the reactor makes a logging context of the transport's ``logPrefix()``,
for log lines of the old kind that would otherwise have none, and asks for the descriptor's number to see whether it is
closed. That is 6 µs an event, as much as a quarter of what a streamed token costs. Loggers name themselves, and who is
closed is not polled any more. Between two polls it looks through what is due in eight calls, where one does. What a
connection has received is read here and not in its own two calls, which are never compiled.

One thing it does differently: where the kernel tells of an error or a hang-up and not that something can be read,
Twisted takes that for a clean end. Of resets, the kernel does so now and then: ``tcp_poll`` looks at a socket that the
reset is just being noted in (net/ipv4/tcp.c). Of 970,000 resets on two cores 9,600 were told of in that way, and an
answer that is framed by the connection's end would have looked whole. Here a connection is read, and says itself.
"""

import errno
import select
from functools import partial
from typing import Any, Final

from twisted.internet import main
from twisted.internet.epollreactor import EPollReactor
from twisted.python import log

from vllmproxy.plain import PLAIN
from vllmproxy.turn import turn

_READABLE: Final = select.EPOLLIN
_HUNG_UP: Final = select.EPOLLHUP | select.EPOLLERR


def lighten(reactor: Any) -> None:
    """Have ``reactor`` poll as :func:`poll` does, if it is Twisted's epoll reactor and not somebody's other one."""
    if type(reactor) is EPollReactor:
        reactor.doIteration = partial(poll, reactor)  # type: ignore[method-assign]


def poll(reactor: Any, timeout: float | None) -> None:
    """Do what ``EPollReactor.doPoll`` does: wait for events, at most ``timeout`` seconds, and act on them; and go on
    with the next ones while the reactor has nothing else to do."""
    wait: float | None = -1 if timeout is None else timeout
    while wait is not None:
        selectables = reactor._selectables
        try:
            events = reactor._poller.poll(wait, len(selectables))
        except OSError as error:
            if error.errno == errno.EINTR:
                return
            raise
        turn.polled()
        if len(events) > 1:
            _act_on_all(reactor, selectables, dict(reversed(events)))
        else:
            for fd, event in events:
                _act_on(reactor, selectables, fd, event)
        wait = _idle_for(reactor)


def _act_on_all(reactor: Any, selectables: Any, told: dict[int, int]) -> None:
    turn.begin(told)
    try:
        while told:
            _act_on(reactor, selectables, *told.popitem())  # the last, and they stand there in reverse
    finally:
        turn.end()


def _act_on(reactor: Any, selectables: Any, fd: int, event: int) -> None:
    selectable = selectables.get(fd)
    if selectable is None:
        return  # an event before this one ended it
    try:
        if event == _READABLE:
            _read(reactor, selectable)
        else:
            turn.prepare()  # Twisted's own queue may leave
            if event & _HUNG_UP and fd in reactor._reads and type(selectable) in PLAIN:
                event |= _READABLE
            reactor._doReadOrWrite(selectable, fd, event)
    except Exception:  # nothing is awaited; what raises when it is told of its end must not hold up the others
        log.err()


def _idle_for(reactor: Any) -> float | None:
    """Return for how many seconds nothing is due, -1 if nothing ever is; ``None`` if something is now."""
    if reactor._newTimedCalls or reactor.threadCallQueue or reactor._justStopped or not reactor._started:
        return None
    if not reactor._pendingTimedCalls:
        return -1
    idle = reactor._pendingTimedCalls[0].time - reactor.seconds()
    return idle if idle > 0 else None


def _read(reactor: Any, selectable: Any) -> None:
    """Do what ``_doReadOrWrite`` does for what can be read."""
    try:
        why = _receive(selectable) if type(selectable) in PLAIN else selectable.doRead()
    except BaseException as error:  # as there: it is logged, and what raised it is disconnected
        why = error
        log.err()
    if why:
        reactor._disconnectSelectable(selectable, why, True)


def _receive(transport: Any) -> Any:
    """Do what a connection's ``doRead`` does, but for descriptors that come over a UNIX socket: nobody wants any, and
    the kernel closes those that are not asked for."""
    try:
        data = transport.socket.recv(transport.bufferSize)
    except BlockingIOError:
        return None
    except OSError:
        return main.CONNECTION_LOST
    if not data:
        return main.CONNECTION_DONE
    transport.protocol.dataReceived(data)
    return None
