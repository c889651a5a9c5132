"""One observer made of several."""

import time
from collections.abc import Callable, Iterable

from twisted.logger import Logger

from vllmproxy.observers.record import Observer, RequestRecord
from vllmproxy.soon import Soon, at_once

_log = Logger(namespace=__name__)

_SECONDS_BETWEEN_COMPLAINTS = 1.0


class FanOut:
    """Offers everything to each observer; one that raises harms neither the request nor the others.

    What it raised is logged with its traceback, for each observer once a second at most.

    :param soon: when records are offered, one after the other to each.
    :param seconds: a monotonic clock.
    """

    def __init__(
        self, observers: Iterable[Observer], *, soon: Soon = at_once, seconds: Callable[[], float] = time.monotonic
    ) -> None:
        self._observers = tuple(observers)
        self._soon = soon
        self._seconds = seconds
        self._records: list[RequestRecord] = []
        self._quiet_until: dict[int, float] = {}

    def started(self) -> None:
        """Tell all of them that a request began."""
        for index, observer in enumerate(self._observers):
            try:
                observer.started()
            except Exception:  # no await in it: nothing of a cancellation can pass here
                self._complain(index)

    def finished(self, record: RequestRecord) -> None:
        """Offer ``record`` to all of them."""
        self._records.append(record)
        if len(self._records) == 1:
            self._soon(self.flush)

    def flush(self) -> None:
        """Offer what was to be offered soon."""
        records, self._records = self._records, []
        for index, observer in enumerate(self._observers):
            for record in records:
                try:
                    observer.finished(record)
                except Exception:  # as above
                    self._complain(index)

    def _complain(self, index: int) -> None:
        now = self._seconds()
        if now >= self._quiet_until.get(index, now):
            self._quiet_until[index] = now + _SECONDS_BETWEEN_COMPLAINTS
            name = type(self._observers[index]).__name__
            _log.failure("The observer {observer} failed; its record is lost", observer=name)
