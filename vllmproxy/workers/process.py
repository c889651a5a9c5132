"""A worker's process, as its parent starts it and hears of it."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from attrs import frozen
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.protocol import Factory, ProcessProtocol
from twisted.python.failure import Failure

from vllmproxy.workers.channel import Channel, Handler
from vllmproxy.workers.task import CHANNEL, LISTENERS, LOADS, Task

#: What systemd says to one process only (sd_notify(3), sd_listen_fds(3)).
_OURS: Final = ("NOTIFY_SOCKET", "WATCHDOG_", "LISTEN_")
#: Those that have one: most real-time signals have none.
_SIGNAL_NAMES: Final = {int(each): each.name for each in signal.Signals}


@frozen
class Ending:
    """How a process ended.

    :ivar status: its exit status; ``None`` where a signal ended it.
    :ivar how: for people.
    """

    status: int | None
    how: str


class WorkerProcess(ProcessProtocol):
    """Runs at once.

    :param loads: the descriptor of :class:`~vllmproxy.workers.loads.Loads`.
    :param listeners: the descriptors of the listening sockets.
    :param handler: takes what it says on its channel.
    :param complained: takes the lines of its standard error; ``ended``: called when the process is no more and all of
        that has been heard.
    """

    def __init__(
        self,
        reactor: Any,
        task: Task,
        loads: int,
        listeners: Sequence[int],
        *,
        handler: Handler,
        complained: Callable[[str], object],
        ended: Callable[[Ending], object],
    ) -> None:
        self.channel = Channel(handler, self._heard_all)
        self._task = task
        self._complained = complained
        self._ended = ended
        self._line = b""
        self._ending: Ending | None = None
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            factory = Factory.forProtocol(lambda: self.channel)
            reactor.adoptStreamConnection(ours.fileno(), socket.AF_UNIX, factory)
            descriptors: dict[int, int | str] = {0: "w", 1: 1, 2: "r", CHANNEL: theirs.fileno(), LOADS: loads}
            descriptors |= dict(enumerate(listeners, LISTENERS))
            # -P: or a file in the working directory would be taken for a module, as twistd takes none.
            command = [sys.executable, "-P", "-m", "vllmproxy.workers"]
            reactor.spawnProcess(self, command[0], command, _environment(os.environ), childFDs=descriptors)

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.transport is not None
        pid: int = self.transport.pid
        return pid

    def kill(self, number: signal.Signals) -> None:
        """Send it a signal."""
        with suppress(ProcessExitedAlready):
            self.transport.signalProcess(int(number))  # type: ignore[union-attr]

    def connectionMade(self) -> None:
        """It has begun: give it its task."""
        assert self.transport is not None
        self.transport.write(self._task.as_json())
        self.transport.closeStdin()

    def errReceived(self, data: bytes) -> None:
        """It says something that is not in its log."""
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._complained(line.decode(errors="replace"))

    def processEnded(self, reason: Failure) -> None:
        """It is no more."""
        if self._line:
            self.errReceived(b"\n")
        value: Any = reason.value
        if value.signal is None:
            self._ending = Ending(value.exitCode, f"with status {value.exitCode}")
        else:
            self._ending = Ending(None, f"by {_SIGNAL_NAMES.get(value.signal, f'signal {value.signal}')}")
        if not self.channel.connected:
            self._heard_all()

    def _heard_all(self) -> None:
        """Nothing more comes on the channel, which may be so before or after its end."""
        if self._ending is not None:
            self._ended(self._ending)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(_OURS)}
