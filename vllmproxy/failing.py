"""How a process that cannot do its work ends: with one sentence, and with status 1."""

import atexit
import os
import sys
from typing import Any

from twisted.logger import Logger

_log = Logger(namespace=__name__)


class CannotStart(Exception):
    """The proxy cannot do its work; the text says why and what to do."""


def complain(message: str) -> None:
    """Say why the process ends: to whoever started it, wherever the log goes; in the log where nobody is left."""
    if os.path.sameopenfile(2, os.open(os.devnull, os.O_WRONLY)):
        _log.critical("{message}", message=message)
    os.write(2, f"vllmproxy: {message}\n".encode())


def refusal(reason: Exception) -> CannotStart:
    """Say ``reason``, and return what a service raises that does not start.

    twistd cleans up behind an exception, tells a waiting parent, and lets it end the process with status 1; what it
    would print has been said already, and better.
    """
    complain(str(reason))
    sys.excepthook = lambda *_: None
    return CannotStart(str(reason))


def end_with_failure(reactor: Any) -> None:
    """Stop the reactor. One that was stopped returns as if all were well, and twistd would exit with 0."""
    atexit.register(_exit_with_failure)
    reactor.stop()


def _exit_with_failure() -> None:
    sys.stdout.flush()
    os._exit(1)
