"""One poll of the reactor: what it has told of, and what waits until that has been acted on."""

from collections.abc import Callable
from typing import Any, Final

from vllmproxy.plain import write_now

#: Bytes from which on a piece is not kept for the end of a turn: who sends it is to hear whether the peer takes it.
_LONG: Final = 16_384
#: Connections that may have something kept: a reader should not wait for many others' requests to be acted on.
_MOST: Final = 32


class Turn:
    """What is written while several events are acted on is kept, and written when they are.

    Each write by itself wakes its reader up, who is done and asleep again before the next; of writes in a row only the
    first does, and the code of the kernel that they share stays in the processor's cache.
    """

    def __init__(self) -> None:
        #: Descriptors that the last poll told of and nobody has acted on yet, with their events.
        self.told: dict[int, int] = {}
        self._keeps = False
        self._kept: dict[Any, list[bytes | memoryview]] = {}
        self._before: list[Callable[[], None]] = []

    def begin(self, told: dict[int, int]) -> None:
        """These events are about to be acted on, and taken out of ``told`` one after the other."""
        self.told = told
        self._keeps = len(told) > 1

    def end(self) -> None:
        """They are."""
        self._keeps = False
        self._prepare()
        self._write_kept()

    def before_writing(self, work: Callable[[], None]) -> None:
        """Call ``work``, which raises nothing, before anything that is written from now on leaves."""
        if self._keeps:
            self._before.append(work)
        else:
            work()

    def write(self, transport: Any, data: bytes | memoryview) -> None:
        """Write to a plain transport, that is only written to in this way, as :func:`write_now` does, at the end of
        this turn at the latest."""
        kept = self._kept.get(transport)
        if not self._keeps or len(data) >= _LONG:
            self._prepare()
            if kept is not None:
                del self._kept[transport]
                write_now(transport, b"".join(kept))
            write_now(transport, data)
        elif kept is not None:
            kept.append(data)
        elif transport.dataBuffer or transport._tempDataBuffer:
            # It may be polled for writing, in this turn too: if it is to be closed behind what is queued, it would be.
            self._prepare()
            write_now(transport, data)
        else:
            self._kept[transport] = [data]
            if len(self._kept) >= _MOST:
                self._write_kept()

    def _prepare(self) -> None:
        while self._before:
            self._before.pop()()

    def _write_kept(self) -> None:
        for transport in list(self._kept):
            kept = self._kept.pop(transport, None)
            if kept is not None and not transport._aborting:  # what was given up since must not reach the peer any more
                if self._before:  # for the first, and for what a write brings about
                    self._prepare()
                write_now(transport, kept[0] if len(kept) == 1 else b"".join(kept))


#: That of the reactor, of which there is one.
turn: Final = Turn()
