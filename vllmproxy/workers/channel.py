"""What parent and worker say to each other: JSON, in frames, over a pair of sockets. Each can tell and can ask."""

import json
from collections.abc import Callable
from typing import Any, Final

from twisted.internet.defer import Deferred, fail, maybeDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.protocols.basic import Int32StringReceiver
from twisted.python.failure import Failure

_log = Logger(namespace=__name__)

_ANSWER: Final = "answer"

#: Takes what is told or asked, as a kind and a body. What it returns, or what that fires with, is the answer.
Handler = Callable[[str, Any], Any]


class ChannelLost(Exception):
    """The other process is gone, or is about to be."""


class Channel(Int32StringReceiver):
    """One end. A message is ``[number, kind, body]``; those with a number want an answer, which has the same one.

    :param handler: takes what the other end says.
    :param lost: called when the other end is gone.
    """

    MAX_LENGTH = 64 << 20

    def __init__(self, handler: Handler, lost: Callable[[], object] = lambda: None) -> None:
        self._handler = handler
        self._lost = lost
        self._number = 0
        self._asked: dict[int, Deferred[Any]] = {}

    def tell(self, kind: str, body: Any = None) -> None:
        """Say something; where nobody listens any more it is lost."""
        self._say(0, kind, body)

    def ask(self, kind: str, body: Any = None, *, within: tuple[float, IReactorTime] | None = None) -> Deferred[Any]:
        """Return what fires with the answer, or fails with :class:`ChannelLost`.

        :param within: seconds, and whose: after that it fails with ``TimeoutError`` of Twisted's.
        """
        if not self.connected:
            return fail(ChannelLost())
        self._number += 1
        number = self._number
        answer: Deferred[Any] = Deferred(lambda _: self._forget(number))
        self._asked[number] = answer
        self._say(number, kind, body)
        return answer if within is None else answer.addTimeout(*within)

    def _forget(self, number: int) -> None:
        self._asked.pop(number, None)

    def _say(self, number: int, kind: str, body: Any) -> None:
        if self.connected:
            self.sendString(json.dumps([number, kind, body], separators=(",", ":")).encode())  # type: ignore[no-untyped-call]

    def stringReceived(self, string: bytes) -> None:
        """Take a message."""
        number, kind, body = json.loads(string)
        if kind == _ANSWER:
            asked = self._asked.pop(number, None)
            if asked is not None:
                asked.callback(body)
            return
        handling = maybeDeferred(self._handler, kind, body)
        if number:
            handling.addCallback(lambda answer: self._say(number, _ANSWER, answer))
        handling.addErrback(lambda failure: _log.failure("{kind} failed", failure, kind=kind))

    def connectionLost(self, reason: Failure | None = None) -> None:
        """Whoever waits for an answer does not get one."""
        self.connected = 0
        asked, self._asked = self._asked, {}
        for each in asked.values():
            each.errback(ChannelLost())
        self._lost()
