"""One poll of the reactor: what it has told of, and what waits until that has been acted on."""

from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from twisted.logger import Logger

from vllmproxy.plain import write_now

_log = Logger(namespace=__name__)

#: Bytes from which on a piece is not kept for the end of a turn: who sends it is to hear whether the peer takes it.
_LONG: Final = 16_384
#: Connections that may have something kept: a reader should not wait for many others' requests to be acted on.
_MOST: Final = 32
#: Seconds for which a poll's word holds: what arrives later is asked for. A turn may take many times as long.
_HOLDS: Final = 0.002


class Turn:
    """What is written while several events are acted on is kept, and written when they are.

    Each write by itself wakes its reader up, who is done and asleep again before the next; of writes in a row only the
    first does, and the code of the kernel that they share stays in the processor's cache.
    """

    def __init__(self) -> None:
        #: How many polls there were; always 0 where the reactor is not :mod:`vllmproxy.polling`'s.
        self.number = 0
        #: Until when what the last one told of a connection is taken for how it is, in ``time.monotonic()``.
        self.holds_until = 0.0
        #: Descriptors that the last poll told of and nobody has begun to act on, with their events.
        self.told: dict[int, int] = {}
        self._keeps = False
        self._kept: dict[Any, list[bytes | memoryview]] = {}
        self._before: list[Callable[[], None]] = []

    def polled(self) -> None:
        """A poll has returned."""
        self.number += 1
        self.holds_until = monotonic() + _HOLDS

    def begin(self, told: dict[int, int]) -> None:
        """These several events are about to be acted on, and taken out of ``told`` one after the other."""
        self.told = told
        self._keeps = True

    def end(self) -> None:
        """They are."""
        self._keeps = False
        self.prepare()
        self._write_kept()

    def before_writing(self, work: Callable[[], None]) -> None:
        """Call ``work``, which writes to no connection, before anything leaves that is given to :meth:`write` or to a
        transport from now on; of several works in any order."""
        if self._keeps:
            self._before.append(work)
        else:
            work()

    def write(self, transport: Any, data: bytes | memoryview) -> None:
        """Write to a plain transport, that is only written to in this way, as :func:`write_now` does, at the end of
        this turn at the latest."""
        if not self._keeps or len(data) >= _LONG:
            self.flush(transport)
            self.prepare()
            write_now(transport, data)
        elif (kept := self._kept.get(transport)) is not None:
            kept.append(data)
        elif transport.dataBuffer or transport._tempDataBuffer:
            # It may be polled for writing, in this turn too: if it is to be closed behind what is queued, it would be.
            self.prepare()
            write_now(transport, data)
        else:
            self._kept[transport] = [data]
            if len(self._kept) >= _MOST:
                self._write_kept()

    def keeps(self, transport: Any) -> bool:
        """Whether something is kept for one connection."""
        return transport in self._kept

    def flush(self, transport: Any) -> None:
        """Write what is kept for one connection."""
        kept = self._kept.pop(transport, None)
        if kept is not None:
            self.prepare()
            write_now(transport, b"".join(kept))

    def prepare(self) -> None:
        """Something may leave now: do what is to be done before."""
        while self._before:
            try:
                self._before.pop()()
            except Exception:  # nothing is awaited; what is kept for others is not to wait for that
                _log.failure("What was to be done before writing failed")

    def _write_kept(self) -> None:
        for transport in list(self._kept):
            kept = self._kept.pop(transport, None)
            if kept is not None and not transport._aborting:  # what was given up since must not reach the peer any more
                if self._before:  # for the first, and for what a write brings about
                    self.prepare()
                write_now(transport, kept[0] if len(kept) == 1 else b"".join(kept))


#: That of the reactor, of which there is one.
turn: Final = Turn()
