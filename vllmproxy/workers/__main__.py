"""``python -m vllmproxy.workers``: a worker, as its parent starts it. Not for people.

Its standard input says what it works with (:class:`~vllmproxy.workers.task.Task`), its channel and its listeners are
descriptors from 3 on.
"""

import faulthandler
import os
import signal
import socket
import sys
from typing import Any

from twisted.internet.protocol import Factory
from twisted.logger import globalLogBeginner
from twisted.python.reflect import namedModule

from vllmproxy.reloading import in_force
from vllmproxy.workers.task import CHANNEL, Task


def main() -> None:
    """Run until the parent says that it is over, or is gone itself."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal sends these to all its processes; the parent's word counts
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    faulthandler.enable()  # where it stood, should it be ended for being stuck
    task = Task.of_json(sys.stdin.buffer.read())
    namedModule(task.reactor).install()
    from twisted.internet import reactor as installed_reactor  # noqa: PLC0415 (earlier would install the default one)

    from vllmproxy.service import ProxyService  # noqa: PLC0415
    from vllmproxy.workers.worker import Worker  # noqa: PLC0415

    reactor: Any = installed_reactor
    settings = in_force(task.first.settings(os.environ), task.now.settings(os.environ))
    worker = Worker(task, len(settings.listen), reactor)
    globalLogBeginner.beginLoggingTo([worker.log])  # type: ignore[list-item]  # a method will do
    factory = Factory.forProtocol(lambda: worker.channel)
    reactor.adoptStreamConnection(CHANNEL, socket.AF_UNIX, factory)
    os.close(CHANNEL)
    service = ProxyService(settings, lambda: worker.said.settings(os.environ), reactor, worker)
    service.privilegedStartService()
    service.startService()
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
    reactor.callWhenRunning(worker.serve, service)
    # By then the reactor has a handler of its own, which does not take the second one that a whole group may be sent.
    reactor.callWhenRunning(signal.signal, signal.SIGTERM, lambda *_: reactor.callFromThread(worker.stop))
    reactor.run()


if __name__ == "__main__":
    main()
