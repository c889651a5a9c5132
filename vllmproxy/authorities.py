"""Who may sign the certificate of an ``https://`` upstream or of a Redis, where that is not left to the system."""

import re
from typing import Any, Final, Self

from attrs import frozen
from OpenSSL import crypto
from twisted.internet.ssl import Certificate, trustRootFromCertificates

_CERTIFICATE: Final = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


@frozen
class Authorities:
    """Certificates that are trusted, and no others.

    :ivar pem: each as PEM (RFC 7468).
    """

    pem: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the authorities whose certificates stand in ``text``.

        :raises ValueError: with one sentence.
        """
        pem = tuple(_CERTIFICATE.findall(text))
        if not pem:
            raise ValueError("it holds no certificate; put the authority's there, as PEM (-----BEGIN CERTIFICATE-----)")
        made = cls(pem)
        try:
            made.trust_root()
        except (crypto.Error, ValueError):
            raise ValueError(f"one of its {len(pem)} certificates is damaged; copy it there anew") from None
        return made

    def trust_root(self) -> Any:
        """Return what Twisted's ``trustRoot`` takes."""
        return trustRootFromCertificates([Certificate.loadPEM(each.encode()) for each in self.pem])
