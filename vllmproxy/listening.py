"""Opening the listeners: all of them, or a sentence that says why not."""

import errno
import os
import socket
from collections.abc import Sequence
from typing import Any

from attrs import frozen
from OpenSSL import SSL, crypto
from twisted.internet.defer import Deferred, succeed
from twisted.internet.endpoints import AdoptedStreamServerEndpoint, serverFromString
from twisted.internet.error import CannotListenError, VerifyError
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.python.failure import Failure

from vllmproxy.certificates import Certificate, split_endpoint
from vllmproxy.inherited import InheritedUNIXPort

#: How many connections the kernel keeps for us while we are busy; Twisted's 50 drops them under a burst.
BACKLOG = 1024


#: What a description can be wrong with, and the files that it names.
_ERRORS = (OSError, ValueError, TypeError, AttributeError, VerifyError, SSL.Error, crypto.Error)
#: What to do about what the system says when it does not open a listener.
_REMEDIES = {
    errno.EADDRINUSE: "stop what listens there (ss -ltnp shows it), or choose another port",
    errno.EADDRNOTAVAIL: "name one of this machine, or leave interface= out",
    errno.EACCES: "choose a port from 1024 up, or a directory it may write in, or have systemd hand the socket over",
    errno.ENOENT: "make its directory, or choose another path",
}


@frozen
class Listener:
    """An endpoint that is open.

    :ivar certificate: of one with TLS.
    """

    description: str
    port: IListeningPort
    certificate: Certificate | None = None


class CannotListen(Exception):
    """A listener cannot be opened; the text says which and why."""


def listen(reactor: Any, descriptions: Sequence[str], factory: Factory) -> list[Listener]:
    """Listen on every endpoint, and accept nothing yet: :func:`accept` begins that.

    :raises CannotListen: and leaves none of them open.
    """
    listeners: list[Listener] = []
    try:
        for description in descriptions:
            listeners.append(_listen(reactor, description, factory))
    except CannotListen:
        for listener in listeners:
            listener.port.stopListening()
        raise
    return listeners


def accept(listeners: Sequence[Listener]) -> None:
    """Take connections, those that came meanwhile first."""
    for listener in listeners:
        listener.port.startReading()  # type: ignore[attr-defined]


def renew_certificates(listeners: Sequence[Listener]) -> list[str]:
    """Show connections to come what the certificates' files hold now; return a sentence on each that cannot be used,
    for which the old one stays."""
    problems = []
    for listener in listeners:
        if listener.certificate is not None:
            try:
                listener.certificate.renew()
            except _ERRORS as error:
                problems.append(f"the certificate of {listener.description} stays the old one: {error}")
    return problems


def secured(description: str, factory: Factory) -> tuple[str, Any, Certificate | None]:
    """Return the endpoint below TLS, if there is any, the factory for what comes from it, and the certificate shown.

    :raises CannotListen: the certificate cannot be used.
    """
    below, arguments = split_endpoint(description)
    if arguments is None:
        return below, factory, None
    try:
        certificate = Certificate(arguments)
    except _ERRORS as error:
        raise CannotListen(f"cannot listen on {description}: {error}") from None
    return below, TLSMemoryBIOFactory(certificate, False, factory), certificate


def _listen(reactor: Any, description: str, factory: Factory) -> Listener:
    below, wrapped, certificate = secured(description, factory)
    try:
        listening = _open(reactor, serverFromString(reactor, _with_backlog(below)), wrapped)
    except (LookupError, AttributeError):  # of the names, the numbers, the domain; only systemd: looks them up
        raise CannotListen(
            f"cannot listen on {description}: systemd handed over no socket of that name or number and domain; "
            "have its socket unit do it (systemd/vllmproxy.socket), or listen on tcp:"
        ) from None
    except _ERRORS as error:
        raise CannotListen(f"cannot listen on {description}: {error}") from None
    # Twisted's own server endpoints bind before they return; so does StreamServerEndpointService rely on it.
    results: list[Any] = []
    listening.addBoth(results.append)
    if not results:
        raise CannotListen(f"cannot listen on {description}: this kind of endpoint does not bind at once")
    (result,) = results
    if isinstance(result, Failure):
        raise CannotListen(f"cannot listen on {description}: {_why(result.value)}")
    result.stopReading()
    return Listener(description, result, certificate)


def _why(error: object) -> str:
    """Return why, and where that is known what to do."""
    if isinstance(error, CannotListenError):
        if not isinstance(error.socketError, OSError):  # UNIX sockets are locked; that is all Twisted says of it
            path = os.fsdecode(error.port)
            return f"another process listens there, or {path}.lock would be gone; stop it, or choose another path"
        error = error.socketError
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{error.strerror}; {remedy}" if remedy else error.strerror


def _open(reactor: Any, endpoint: Any, factory: Factory) -> Deferred[Any]:
    if isinstance(endpoint, AdoptedStreamServerEndpoint) and endpoint.addressFamily == socket.AF_UNIX:
        with socket.socket(fileno=endpoint.fileno) as inherited:  # the port has a copy of it
            inherited.setblocking(False)
            port: Any = InheritedUNIXPort
            made = port._fromListeningDescriptor(reactor, inherited.fileno(), factory)
        made.startListening()
        return succeed(made)
    opening: Deferred[Any] = endpoint.listen(factory)
    return opening


def _with_backlog(description: str) -> str:
    if description.startswith("systemd:") or "backlog=" in description:
        return description
    return f"{description}:backlog={BACKLOG}"
