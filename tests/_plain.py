"""A plain transport in memory, as :mod:`vllmproxy.plain` uses one."""

from collections.abc import Callable


class Transport:
    """A plain one in memory.

    :ivar writes: what went to its socket, in so many steps.
    """

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.dataBuffer = b""
        self._tempDataBuffer: list[bytes] = []
        self.disconnecting = self.disconnected = self._aborting = False
        self.socket = self
        self.sends: Callable[[], None] = lambda: None

    def send(self, data: bytes) -> int:
        self.writes.append(bytes(data))
        self.sends()
        return len(data)
