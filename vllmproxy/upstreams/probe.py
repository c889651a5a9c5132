"""Is there a vLLM that answers: for whoever asks whether this proxy is ready."""

from typing import Any, Final

from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from vllmproxy.http1.agent import ConnectFailed
from vllmproxy.http1.answer import Answer, AnswerLost, OutgoingHeaders
from vllmproxy.http1.message import BadAnswer
from vllmproxy.upstreams.server import Server

_log = Logger(namespace=__name__)

#: Seconds for the whole of a probe, and for which its outcome is believed: who asks more often costs vLLM nothing.
_TIMEOUT: Final = 2.0
_BELIEVED: Final = 1.0
_UNREACHABLE: Final = (ConnectFailed, AnswerLost, BadAnswer, TimeoutError, CancelledError)


class Probe:
    """Asks a server's ``/health``. One that is ill says so with a status of 500 or more (vLLM's ``health`` route); any
    other answer shows that it is there."""

    def __init__(self, server: Server, clock: IReactorTime) -> None:
        self._server = server
        self._clock = clock
        self._until = float("-inf")
        self._well = False
        self._waiting: list[Deferred[bool]] | None = None

    def is_well(self) -> Deferred[bool]:
        """Fire with whether the server answers; at once where that was known a moment ago."""
        waiter: Deferred[bool] = Deferred()
        if self._clock.seconds() < self._until:
            waiter.callback(self._well)
        elif self._waiting is not None:
            self._waiting.append(waiter)
        else:
            self._waiting = [waiter]
            asking: Deferred[Any] = self._ask()
            asking.addTimeout(_TIMEOUT, self._clock)
            asking.addCallbacks(_is_good, _is_down)
            asking.addBoth(self._known)
        return waiter

    def _ask(self) -> Deferred[Any]:
        server = self._server
        lines = b"host: %s\r\n%s" % (server.upstream.authority, server.authorization)
        url = server.upstream.origin + server.upstream.base_path + b"/health"
        return server.client.request(b"GET", url, headers=OutgoingHeaders(lines))

    def _known(self, well: bool | Failure) -> None:
        if isinstance(well, Failure):
            _log.failure("Asking vLLM for its health failed", well)
        self._well = well is True
        self._until = self._clock.seconds() + _BELIEVED
        waiting, self._waiting = self._waiting or [], None
        for waiter in waiting:
            waiter.callback(self._well)


def _is_good(answer: Answer) -> bool:
    answer.connection.abort()  # its body is of no interest, and may never end
    return answer.head.status < 500


def _is_down(reason: Failure) -> bool:
    reason.trap(*_UNREACHABLE)
    return False
