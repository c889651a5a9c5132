"""Writing to pipes, sockets and standard output that nobody may be reading."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from twisted.internet.task import Clock

from vllmproxy.observers.descriptor import LogDescriptor
from vllmproxy.observers.jsonlines import BATCH_SECONDS, JsonLines
from vllmproxy.observers.record import RequestRecord


def record(request_id: str) -> RequestRecord:
    return RequestRecord(time=0.0, request_id=request_id, method="GET", route="/")


def _pipe() -> tuple[Callable[[], bytes], int]:
    reader, descriptor = os.pipe()
    os.set_blocking(reader, False)
    return lambda: os.read(reader, 1 << 20), descriptor


def _socket() -> tuple[Callable[[], bytes], int]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    return lambda: theirs.recv(1 << 20), ours.detach()


@pytest.fixture(params=[_pipe, _socket])
def stalled(request: pytest.FixtureRequest) -> tuple[Callable[[], bytes], int]:
    """A blocking descriptor, and how to read what was written to it."""
    made: tuple[Callable[[], bytes], int] = request.param()
    return made


def test_a_blocking_descriptor_that_nobody_reads_does_not_block(
    stalled: tuple[Callable[[], bytes], int],
) -> None:
    clock = Clock()
    read, descriptor = stalled
    assert os.get_blocking(descriptor)
    sink = LogDescriptor(descriptor)
    log = JsonLines(sink.write, clock, close=sink.close)
    for number in range(10_000):  # over a megabyte, more than either holds
        log.finished(record(str(number)))
    assert os.get_blocking(descriptor)  # others share that flag
    received = b""
    while received.count(b"\n") < 10_000:
        received += read()
        clock.advance(BATCH_SECONDS)
    log.close()
    assert [json.loads(line)["request_id"] for line in received.splitlines()] == [str(n) for n in range(10_000)]
    assert log.dropped == 0


def test_a_pipe_is_given_whole_lines_of_atomic_length() -> None:
    read, descriptor = _pipe()
    sink = LogDescriptor(descriptor)
    data = (b"x" * 99 + b"\n") * 100
    assert sink.write(data) == 4000
    assert sink.write(b"y" * 5000 + b"\n") == 4096
    assert len(read()) == 8096
    sink.close()


def test_a_socket_is_given_whole_lines_of_atomic_length() -> None:
    read, descriptor = _socket()
    sink = LogDescriptor(descriptor)
    assert sink.write((b"x" * 99 + b"\n") * 1000) == 32_700
    assert sink.write(b"y" * 40_000 + b"\n") == 32_768
    assert len(read()) == 65_468
    sink.close()


def test_a_reader_that_is_gone_is_an_error_and_no_signal() -> None:
    reader, descriptor = os.pipe()
    os.close(reader)
    sink = LogDescriptor(descriptor)
    with pytest.raises(BrokenPipeError):
        sink.write(b"line\n")
    sink.close()


SCRIPT = """
import os, sys
from twisted.internet.task import Clock
from vllmproxy.observers.jsonlines import open_access_log
from vllmproxy.observers.record import RequestRecord

log = open_access_log("-", Clock())
blocking = os.get_blocking(1)
null = os.open(os.devnull, os.O_WRONLY)
os.dup2(null, 1)  # as a daemon does
sys.stdout = None
for number in range({count}):
    log.finished(RequestRecord(time=0.0, request_id=str(number), method="GET", route="/"))
log.close()
log.reopen()
sys.stderr.write(f"{{blocking}} {{log.dropped}}")
"""


def run_script(count: int, stdout: int) -> subprocess.CompletedProcess[bytes]:
    script = [sys.executable, "-c", SCRIPT.format(count=count)]
    return subprocess.run(script, stdout=stdout, stderr=subprocess.PIPE, timeout=60, check=True)


@pytest.fixture(params=["pipe", "socket", "file"])
def outlet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Something to be a process' standard output: where to read it, and where to write it."""
    if request.param == "file":
        path = tmp_path / "out"
        path.write_bytes(b"")
        ends = (os.open(path, os.O_RDONLY), os.open(path, os.O_WRONLY))
    elif request.param == "pipe":
        ends = os.pipe()
    else:
        first, second = socket.socketpair()
        ends = (first.detach(), second.detach())
    yield ends
    for end in ends:
        os.close(end)


def test_standard_output_is_the_original_one(outlet: tuple[int, int]) -> None:
    reading, writing = outlet
    done = run_script(3, writing)
    lines = os.read(reading, 1 << 16).splitlines()
    assert [json.loads(line)["request_id"] for line in lines] == ["0", "1", "2"]
    assert done.stderr == b"True 0"


def test_standard_output_that_nobody_reads_does_not_hold_the_process() -> None:
    reading, writing = os.pipe()
    done = run_script(20_000, writing)
    blocking, dropped = done.stderr.split()
    assert blocking == b"True"
    got = os.read(reading, 1 << 20)
    assert got.endswith(b"\n")
    assert got.count(b"\n") + int(dropped) == 20_000
    os.close(reading)
    os.close(writing)
