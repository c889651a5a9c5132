"""What is heard of a worker's process, without one."""

import signal

import pytest
from twisted.internet.error import ProcessDone, ProcessTerminated
from twisted.python.failure import Failure

from vllmproxy.said import Said
from vllmproxy.workers.process import Ending, WorkerProcess
from vllmproxy.workers.task import Task


class Reactor:
    """Starts nothing."""

    def adoptStreamConnection(self, *args: object) -> None:
        pass

    def spawnProcess(self, *args: object, **kwargs: object) -> None:
        pass


@pytest.mark.parametrize(
    ("reason", "ending"),
    [
        (ProcessDone(0), Ending(0, "with status 0")),
        (ProcessTerminated(exitCode=3), Ending(3, "with status 3")),
        (ProcessTerminated(signal=signal.SIGKILL), Ending(None, "by SIGKILL")),
        (ProcessTerminated(signal=40), Ending(None, "by signal 40")),
    ],
)
def test_how_it_ended(reason: Exception, ending: Ending) -> None:
    heard: list[Ending] = []
    said = Said({}, {})
    process = WorkerProcess(
        Reactor(),
        Task(1, said, said, "reactor"),
        0,
        [],
        handler=lambda kind, body: None,
        complained=lambda line: None,
        ended=heard.append,
    )
    process.processEnded(Failure(reason))
    assert heard == [ending]
