"""What systemd is told, on a real socket."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, globalLogPublisher

from vllmproxy.notify import Notifier


class Manager:
    """The end of systemd."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind("\0" + address[1:] if address.startswith("@") else address)
        self._sock.setblocking(False)

    def heard(self) -> list[str]:
        """Every message since the last call."""
        messages = []
        while True:
            try:
                messages.append(self._sock.recv(4096).decode())
            except BlockingIOError:
                return messages

    def close(self) -> None:
        self._sock.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    made = Manager(f"{tmp_path}/notify" if request.param == "path" else f"@vllmproxy-test-{os.getpid()}")
    yield made
    made.close()


def test_ready_reloading_stopping(manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.address}, Clock())
    notifier.ready()
    assert manager.heard() == ["READY=1"]
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading()
    (message,) = manager.heard()
    first, second = message.split("\n")
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.ready()
    notifier.stopping()
    notifier.close()
    assert manager.heard() == ["READY=1", "STOPPING=1"]


@pytest.mark.parametrize("pid", [None, os.getpid()], ids=["nobody in particular", "this process"])
def test_the_watchdog_is_fed_by_the_reactor_at_half_of_its_time(manager: Manager, pid: int | None) -> None:
    clock = Clock()
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "10000000"}
    environ |= {} if pid is None else {"WATCHDOG_PID": str(pid)}
    notifier = Notifier(environ, clock)
    clock.advance(100)
    assert manager.heard() == []  # nothing is watched before it is ready
    notifier.ready()
    assert manager.heard() == ["READY=1", "WATCHDOG=1"]
    clock.advance(4.9)
    assert manager.heard() == []
    clock.advance(0.2)
    assert manager.heard() == ["WATCHDOG=1"]
    notifier.ready()  # after a reload
    clock.pump([5, 5])
    assert manager.heard() == ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]
    notifier.stopping()
    clock.advance(5)
    assert manager.heard() == ["STOPPING=1", "WATCHDOG=1"]
    notifier.close()
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize(
    "watchdog", [{}, {"WATCHDOG_USEC": ""}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}]
)
def test_no_watchdog_for_whom_none_is_meant(manager: Manager, watchdog: dict[str, str]) -> None:
    clock = Clock()
    notifier = Notifier({"NOTIFY_SOCKET": manager.address, **watchdog}, clock)
    notifier.ready()
    assert manager.heard() == ["READY=1"]
    assert not clock.getDelayedCalls()
    notifier.close()


def test_nobody_listens(tmp_path: Path) -> None:
    warnings: list[LogEvent] = []

    def observe(event: LogEvent) -> None:
        if event.get("log_level") is LogLevel.warn:
            warnings.append(event)

    globalLogPublisher.addObserver(observe)
    try:
        Notifier({}, Clock()).ready()
        assert not warnings
        Notifier({"NOTIFY_SOCKET": f"{tmp_path}/nobody"}, Clock()).ready()
        (warning,) = warnings
        assert "No such file" in str(warning["error"])
    finally:
        globalLogPublisher.removeObserver(observe)
