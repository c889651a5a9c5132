"""treq for a proxy: its client's interface over our own agent, and nothing that could change what passes."""

from typing import Any

from treq.client import HTTPClient
from twisted.internet.defer import Deferred
from twisted.web.iweb import IBodyProducer

from vllmproxy.http1.agent import UpstreamAgent
from vllmproxy.http1.answer import Asker, OutgoingHeaders, Request


class StreamingClient(HTTPClient):
    """treq's client for an agent whose requests and answers pass as they are.

    treq's own parses the URL on each call and encodes its host by IDNA, merges cookie jars, wraps the agent in one that
    keeps cookies and in one that unpacks gzip, and wraps the answer. That is most of 60 µs a request, and all of it
    would have to be talked out of doing anything: a shared jar would replay one caller's cookies to the next, a decoder
    would unpack what the client is to get as it is.
    """

    _agent: UpstreamAgent

    def request(  # type: ignore[override]  # what treq would encode, parse or follow has no place here
        self, method: bytes, url: bytes, *, headers: OutgoingHeaders, data: IBodyProducer | None = None
    ) -> "Deferred[Any]":
        """Send a request; the result is an :class:`~vllmproxy.http1.answer.Answer` when its head is complete.

        :param url: the agent's origin with an origin-form target behind it, byte for byte as it is to be sent.
        """
        return self._agent.request(method, url, headers, data)

    def ask(
        self, method: bytes, url: bytes, headers: OutgoingHeaders, data: IBodyProducer | None, asker: Asker
    ) -> Request:
        """Do what :meth:`request` does for who can be called: a Deferred takes as long as all else that this does."""
        return self._agent.ask(method, url, headers, data, asker)
