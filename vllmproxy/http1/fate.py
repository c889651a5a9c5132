"""Was it executed? What TCP knows about a request whose reused connection ended without a byte of an answer.

To HTTP that is ambiguous; a POST must not be sent again unless it is certain that vLLM never saw any of it.
"""

from collections.abc import Callable
from enum import Enum

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from vllmproxy.http1.sockets import Delivery

#: Seconds between two looks at, and in all for, a peer's kernel to take or refuse what was sent after its FIN: a round
#: trip and Linux's longest delayed acknowledgement.
_LOOK_AGAIN = 0.005
_PATIENCE = 0.5


class Fate(Enum):
    """What has become of a request."""

    UNSEEN = "vLLM cannot have seen a byte of it"
    UNKNOWN = "vLLM may have seen it"
    OPEN = "it is on its way; the peer's kernel has yet to take it or to refuse it"


def fate_of(first: Delivery, given: int, now: Delivery, *, orderly: bool) -> Fate:
    """Judge by the connection's counts.

    :param first: when it was made, or when the request began.
    :param given: bytes that were to be sent between that and the request.
    :param orderly: the peer closed with a FIN; ``False``: it reset, or nothing is known.

    Nothing is certain while the kernel may still send what it was given: it may hold the request behind bytes that the
    peer did not take yet. When it has closed the connection, and no byte behind those left this machine, or after a FIN
    our segments were answered by a reset (the peer has closed entirely, and a FIN confirms all that came before it):
    unseen. A confirmed byte: not. After a FIN alone the peer may still read (half-close), so its kernel's word has to
    be waited for. A reset without a FIN proves nothing: Linux may delay a confirmation by 40 ms, and a peer that read
    the request and then reset looks the same as one that never got it.
    """
    if now.acknowledged > first.acknowledged + given:
        return Fate.UNKNOWN
    if not now.closed:
        return Fate.OPEN if orderly else Fate.UNKNOWN
    return Fate.UNSEEN if orderly or now.sent <= first.sent + given else Fate.UNKNOWN


class Verdict:
    """Finds what became of the requests on one connection, one after the other.

    :param look: tells how far our bytes have come.
    :ivar unseen: what was found last: vLLM cannot have seen a byte of the request.
    """

    def __init__(self, clock: IReactorTime, look: Callable[[], Delivery | None]) -> None:
        self._clock = clock
        self._look = look
        self._opened: Delivery | None = None
        self._first: Delivery | None = None
        self._given = 0
        self._reused = False
        self._orderly = False
        self._call: IDelayedCall | None = None
        self.unseen = False

    def open(self) -> None:
        """The connection is there."""
        self._opened = self._first = self._look()

    def begin(self, *, reused: bool, given: int | None) -> None:
        """A request begins. On a new connection there is no doubt to be resolved: it is never sent again.

        :param given: bytes that were given to the connection since it is open, so that the kernel need not be asked how
            far those before this request came; ``None``: others leave than were given (TLS).
        """
        self.unseen = False
        self._reused = reused
        if given is not None:
            self._given = given
        elif reused:
            self._first = self._look()

    def pronounce(self) -> Fate:
        """Judge by what is known now, while the socket is still there."""
        fate = self._fate(self._first, self._look())
        self.unseen = fate is Fate.UNSEEN
        return fate

    def _fate(self, first: Delivery | None, now: Delivery | None) -> Fate:
        if not self._reused or self._opened is None or first is None or now is None:
            return Fate.UNKNOWN
        if now.acknowledged <= self._opened.acknowledged:  # a request before this one was answered: nobody counts
            return Fate.UNKNOWN
        return fate_of(first, self._given, now, orderly=self._orderly)

    def after_fin(self, judged: Callable[[], None], *, wanted: bool) -> None:
        """Call ``judged`` once it is known whether the peer's kernel takes what was sent, or patience ends.

        :param wanted: somebody waits for the answer; else it is called at once.
        """
        self._orderly = True
        self._wait(judged, _PATIENCE if wanted else 0)

    def _wait(self, judged: Callable[[], None], patience: float) -> None:
        self._call = None
        if self.pronounce() is Fate.OPEN and patience > 0:
            self._call = self._clock.callLater(_LOOK_AGAIN, self._wait, judged, patience - _LOOK_AGAIN)
        else:
            judged()

    def stop(self) -> None:
        """Wait no more."""
        if self._call is not None:
            self._call.cancel()
            self._call = None
