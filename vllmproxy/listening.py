"""Opening the listeners: all of them, or a sentence that says why not."""

from collections.abc import Sequence
from typing import Any

from OpenSSL import SSL, crypto
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure

#: How many connections the kernel keeps for us while we are busy; Twisted's 50 drops them under a burst.
BACKLOG = 1024


class CannotListen(Exception):
    """A listener cannot be opened; the text says which and why."""


def listen(reactor: Any, descriptions: Sequence[str], factory: Factory) -> list[IListeningPort]:
    """Listen on every endpoint, and accept nothing yet: :func:`accept` begins that.

    :raises CannotListen: and leaves none of them open.
    """
    ports: list[IListeningPort] = []
    try:
        for description in descriptions:
            ports.append(_listen(reactor, description, factory))
    except CannotListen:
        for port in ports:
            port.stopListening()
        raise
    return ports


def accept(ports: Sequence[IListeningPort]) -> None:
    """Take connections, those that came meanwhile first."""
    for port in ports:
        port.startReading()  # type: ignore[attr-defined]


def _listen(reactor: Any, description: str, factory: Factory) -> IListeningPort:
    try:
        endpoint = serverFromString(reactor, _with_backlog(description))
    except (OSError, ValueError, TypeError, KeyError, IndexError, SSL.Error, crypto.Error) as error:
        raise CannotListen(f"cannot listen on {description}: {error}") from None
    # Twisted's own server endpoints bind before they return; so does StreamServerEndpointService rely on it.
    results: list[Any] = []
    endpoint.listen(factory).addBoth(results.append)
    if not results:
        raise CannotListen(f"cannot listen on {description}: this kind of endpoint does not bind at once")
    (result,) = results
    if isinstance(result, Failure):
        reason: object = result.value
        if isinstance(reason, CannotListenError):
            reason = reason.socketError
        reason = getattr(reason, "strerror", None) or reason
        raise CannotListen(f"cannot listen on {description}: {reason}")
    result.stopReading()
    port: IListeningPort = result
    return port


def _with_backlog(description: str) -> str:
    kind = description.partition(":")[0]
    if kind == "tls":
        description = "ssl" + description[3:]
    if kind == "systemd" or "backlog=" in description:
        return description
    return f"{description}:backlog={BACKLOG}"
