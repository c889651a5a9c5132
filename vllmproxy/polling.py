"""Twisted's epoll, without the things that it does for each event and nobody here needs.

For each descriptor that can be read or written the reactor makes a logging context of the transport's ``logPrefix()``,
for log lines of the old kind that would otherwise have none, and asks for the descriptor's number to see whether it is
closed. That is 6 µs an event, as much as a quarter of what a streamed token costs. Loggers name themselves, and who is
closed is not polled any more. What a TCP connection brings, it hands to the protocol in two calls more than are needed.
Between two polls it looks through what is due in eight calls, where one does.
"""

import errno
import select
from functools import partial
from typing import Any, Final

from twisted.internet import tcp
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.python import log

from vllmproxy.turn import turn

_READABLE: Final = select.EPOLLIN
#: Whose ``doRead`` is that of :class:`twisted.internet.tcp.Connection` once they are connected, under TLS too.
_TCP: Final = frozenset([tcp.Server, tcp.Client])


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
        told = dict(reversed(events))
        turn.begin(told)
        try:
            _act_on(reactor, selectables, told)
        finally:
            turn.end()
        wait = _idle_for(reactor)


def _act_on(reactor: Any, selectables: Any, told: dict[int, int]) -> None:
    while told:
        fd, event = told.popitem()  # the last, and they stand there in reverse
        selectable = selectables.get(fd)
        if selectable is None:
            continue  # an event before this one ended it
        try:
            if event == _READABLE:
                _read(reactor, selectable)
            else:
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
    """Do what ``_doReadOrWrite`` does for what can be read, and of TCP's transports what their ``doRead`` does."""
    why: BaseException | None = None
    try:
        if type(selectable) not in _TCP or not selectable.connected:
            why = selectable.doRead()
        else:
            try:
                data = selectable.socket.recv(selectable.bufferSize)
            except BlockingIOError:
                return
            except OSError:
                why = CONNECTION_LOST
            else:
                if data:
                    selectable.protocol.dataReceived(data)
                else:
                    why = CONNECTION_DONE
    except BaseException as error:  # as there: it is logged, and what raised it is disconnected
        why = error
        log.err()
    if why:
        reactor._disconnectSelectable(selectable, why, True)
