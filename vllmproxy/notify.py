"""Tells systemd how the proxy is doing (sd_notify(3)); where nobody asked to be told, it tells nobody."""

import os
import socket
import time
from collections.abc import Callable, Mapping

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

_log = Logger(namespace=__name__)

#: Seconds that the manager may take to receive a message; its queue is long.
_TIMEOUT = 1.0


class Notifier:
    """Sends what ``NOTIFY_SOCKET`` is to hear, and turns the watchdog off as long as the reactor turns.

    :param environ: ``NOTIFY_SOCKET``, a path or, after ``@``, an abstract name; ``WATCHDOG_USEC``, ``WATCHDOG_PID``.
    :param is_well: whether the watchdog is to be fed just now.
    :ivar watchdog: the seconds that may pass at most between two feeds; 0: none are asked for.
    """

    def __init__(
        self, environ: Mapping[str, str], clock: IReactorTime, is_well: Callable[[], bool] = lambda: True
    ) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._is_well = is_well
        self._feeding = LoopingCall(self._feed)
        self._feeding.clock = clock
        self.watchdog = _watchdog(environ)

    def ready(self) -> None:
        """It accepts; from here on the watchdog is fed."""
        self._send("READY=1")
        if self.watchdog and not self._feeding.running:
            self._feeding.start(self.watchdog / 2)  # as sd_watchdog_enabled(3) advises

    def reloading(self) -> None:
        """It reads its settings again; :meth:`ready` ends that."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000  # what Type=notify-reload compares with
        self._send(f"RELOADING=1\nMONOTONIC_USEC={now}")

    def stopping(self) -> None:
        """It is going to end."""
        self._send("STOPPING=1")

    def listening_no_more(self) -> None:
        """It takes no new connections; systemd does not care."""

    def close(self) -> None:
        """Feed the watchdog no more."""
        if self._feeding.running:
            self._feeding.stop()

    def _feed(self) -> None:
        if self._is_well():
            self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(_TIMEOUT)
                sock.sendto(message.encode(), self._address)
        except OSError as error:
            _log.warn("systemd cannot be told {message!r}: {error}", message=message, error=str(error))


def _watchdog(environ: Mapping[str, str]) -> float:
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0
    usec = environ.get("WATCHDOG_USEC", "")
    return int(usec) / 1e6 if usec.isascii() and usec.isdigit() else 0
