"""What a process does at which signal."""

import signal
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any


class Signals:
    """SIGHUP reloads. SIGTERM and SIGINT stop the reactor; a second one does not wait for what is under way.

    :param is_running: false once it stops, whoever asked for that.
    :param reload: called in the reactor, as is ``hurry``.
    """

    def __init__(
        self, reactor: Any, is_running: Callable[[], bool], *, reload: Callable[[], object], hurry: Callable[[], object]
    ) -> None:
        self._reactor = reactor
        self._is_running = is_running
        self._reload = reload
        self._hurry = hurry
        self._asked = False

    def hear_reloads(self) -> None:
        """Hear SIGHUP."""
        signal.signal(signal.SIGHUP, lambda *_: self._reactor.callFromThread(self._reload))

    def hear_stops(self) -> None:
        """Hear the others; called when the reactor runs, for it has handlers of its own."""
        for number in (signal.SIGTERM, signal.SIGINT):
            usual = signal.getsignal(number)  # the reactor's, by now, unless whoever started us has it ignored
            if callable(usual):
                signal.signal(number, partial(self._asked_to_stop, usual))

    def _asked_to_stop(
        self, usual: Callable[[int, FrameType | None], object], number: int, frame: FrameType | None
    ) -> None:
        if self._is_running() and not self._asked:
            self._asked = True
            usual(number, frame)
        else:
            self._reactor.callFromThread(self._hurry)
