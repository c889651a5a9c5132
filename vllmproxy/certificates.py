"""The certificate of a TLS listener, which can be exchanged while it listens."""

import re
from pathlib import Path
from typing import Any

from OpenSSL import SSL, crypto
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from zope.interface import implementer

#: What an ``ssl:`` endpoint says of its certificate.
_ARGUMENTS = re.compile(r":((?:privateKey|certKey|extraCertChain|sslmethod|dhParameters)=(?:[^:\\]|\\.)*)")


class _Parser:
    """Stands where an endpoint expects a reactor, and hears what it would show."""

    def listenSSL(self, port: int, factory: None, contextFactory: Any, **where: Any) -> None:
        self.options = contextFactory


def _check(arguments: str) -> None:
    """Raise ``ValueError`` with a sentence on the first file that cannot be used; OpenSSL does not say which it is."""
    said = {"privateKey": "server.pem"}  # where Twisted looks when nothing is said
    for argument in _ARGUMENTS.findall(arguments):
        setting, _, name = argument.partition("=")
        said[setting] = re.sub(r"\\(.)", r"\1", name)
    said.setdefault("certKey", said["privateKey"])
    for setting in ("privateKey", "certKey", "extraCertChain", "dhParameters"):
        if setting in said:
            _check_file(setting, said[setting])


def _check_file(setting: str, name: str) -> None:
    try:
        pem = Path(name).read_bytes()
    except OSError as error:
        why = f"cannot be read ({error.strerror}); check its name and who may read it"
        raise ValueError(f"{setting}={name!r} {why}") from None
    what = ""
    try:
        if setting == "privateKey":
            what = "private key in PEM that needs no passphrase"
            crypto.load_privatekey(crypto.FILETYPE_PEM, pem, b"")  # with None, OpenSSL would ask on the terminal
        elif setting == "certKey":
            what = "certificate in PEM"
            crypto.load_certificate(crypto.FILETYPE_PEM, pem)
    except (crypto.Error, ValueError, TypeError):
        raise ValueError(f"{setting}={name!r} holds no {what}; name a file that does") from None


def _parse(arguments: str) -> Any:
    _check(arguments)
    parser = _Parser()
    serverFromString(parser, f"ssl:0{arguments}").listen(None)
    parser.options.getContext()  # reads on: does the key belong to the certificate?
    return parser.options


def split_endpoint(description: str) -> tuple[str, str | None]:
    """Return the endpoint below TLS, and what is said of the certificate; ``None`` where there is no TLS.

    ``ssl:`` (or ``tls:``) is ``tcp:`` with a certificate; a ``systemd:`` endpoint may have one, too.
    """
    kind, _, rest = description.partition(":")
    arguments = "".join(f":{each}" for each in _ARGUMENTS.findall(description))
    if kind in ("ssl", "tls"):
        return _ARGUMENTS.sub("", f"tcp:{rest}"), arguments
    if kind == "systemd" and arguments:
        return _ARGUMENTS.sub("", description), arguments
    return description, None


@implementer(IOpenSSLServerConnectionCreator)
class Certificate:
    """What one TLS listener shows its clients.

    :param arguments: what :func:`split_endpoint` found. Where the files cannot be used, that raises ``OSError``,
        ``ValueError`` and kin, or one of OpenSSL's own.
    """

    def __init__(self, arguments: str) -> None:
        self._arguments = arguments
        self._options = _parse(arguments)

    def renew(self) -> None:
        """Read the files again, for connections to come. Raises as above; then the old certificate stays."""
        self._options = _parse(self._arguments)

    def serverConnectionForTLS(self, protocol: Any) -> SSL.Connection:
        connection: SSL.Connection = self._options.serverConnectionForTLS(protocol)
        return connection
