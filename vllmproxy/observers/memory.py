"""An observer that keeps the last records, for tests and for looking."""

from collections import deque

from vllmproxy.observers.record import RequestRecord


class MemoryObserver:
    """Keeps the newest records.

    :param maxlen: how many.
    :ivar records: the finished requests, oldest first.
    :ivar in_flight: how many requests are started and not finished.
    """

    def __init__(self, maxlen: int = 1000) -> None:
        self.records: deque[RequestRecord] = deque(maxlen=maxlen)
        self.in_flight = 0

    def started(self) -> None:
        """Take note of one more request."""
        self.in_flight += 1

    def finished(self, record: RequestRecord) -> None:
        """Keep ``record``."""
        self.in_flight -= 1
        self.records.append(record)
