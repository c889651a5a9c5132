"""Klein on the strict channel: buffered requests and answers, in memory."""

import json
from typing import Any

import pytest
from _memory import Hangups, render
from klein import Klein
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers
from twisted.web.iweb import IRequest
from twisted.web.server import Site

from vllmproxy.http1.factory import ServerFactory
from vllmproxy.http1.message import WireError
from vllmproxy.http1.stream import Stream
from vllmproxy.http1.web import WebExchange
from vllmproxy.testing import MemoryTransport

LIMIT = 1000


class App:
    """A small Klein app, and a client in memory."""

    klein = Klein()

    def __init__(self) -> None:
        self.clock = Clock()
        self.site = Site(self.klein.resource(), reactor=self.clock)
        self.done: list[int] = []  # the statuses of what is over, 0 for none
        self.waiting: Deferred[bytes] = Deferred()
        self.ends: list[str] = []
        self.cancelled = 0
        hangups: Any = Hangups()
        self.factory = ServerFactory(self.clock, self._handle, render, hangups)
        self.client = MemoryTransport(self.clock)
        App.current = self
        self.client.connect(self.factory.buildProtocol(self.client.getPeer()))

    def _handle(self, stream: Stream) -> None:
        self.exchange(stream).begin()

    def exchange(self, stream: Stream) -> WebExchange:
        return WebExchange(
            stream,
            self.site,
            limit=LIMIT,
            refuse=self._refuse,
            id=b"r",
            done=lambda request: self.done.append(stream.status),
        )

    def _refuse(self, stream: Stream, error: WireError) -> None:
        stream.respond(error.status, b"Refused", b"", error.message.encode())
        self.done.append(stream.status)

    current: "App"

    @klein.route("/echo", methods=["GET", "POST"])
    def echo(self, request: IRequest) -> bytes:
        told: Any = request
        told.setHeader("content-type", "application/json")
        told.responseHeaders.addRawHeader(b"Set-Cookie", b"a=1")
        told.responseHeaders.addRawHeader(b"Set-Cookie", b"b=2")
        return json.dumps(
            {
                "method": told.method.decode(),
                "uri": told.uri.decode(),
                "args": {k.decode("latin-1"): [v.decode("latin-1") for v in vs] for k, vs in told.args.items()},
                "body": told.content.read().decode("latin-1"),
                "peer": told.getClientAddress().host,
                "host": told.getHeader("host"),
                "cookies": {k.decode(): v.decode() for k, v in told.received_cookies.items()},
            }
        ).encode()

    @klein.route("/wait")
    def wait(self, request: IRequest) -> "Deferred[bytes]":
        app = App.current
        waiting: Deferred[bytes] = Deferred(lambda _: app.ends.append("cancelled"))
        app.waiting = waiting
        return waiting

    @klein.route("/story")
    async def story(self, request: IRequest) -> bytes:
        app = App.current
        try:
            return await app.waiting
        except CancelledError:
            app.ends.append("cancelled")
            raise

    @klein.route("/status/<int:status>")
    def status(self, request: Any, status: int) -> bytes:
        request.setResponseCode(status)
        return b""

    @klein.route("/pieces")
    def pieces(self, request: Any) -> "Deferred[None]":
        request.write(b"one")
        request.write(b"two")
        request.finish()
        return Deferred()

    @klein.route("/pulled")
    def pulled(self, request: Any) -> "Deferred[None]":
        left = [b"a", b"b", b"c"]

        class Pull:
            def resumeProducing(self) -> None:
                if left:
                    request.write(left.pop(0))
                else:
                    request.unregisterProducer()
                    request.finish()

            def stopProducing(self) -> None:
                left.clear()

        request.registerProducer(Pull(), False)
        return Deferred()

    @klein.route("/broken")
    def broken(self, request: IRequest) -> bytes:
        raise ValueError("sk-secret")

    def ask(self, data: bytes) -> tuple[bytes, bytes, bytes]:
        """Send bytes; return the status line, the header lines and the body of what came back."""
        self.client.take()
        self.client.receive(data)
        head, _, body = self.client.take().partition(b"\r\n\r\n")
        line, _, lines = head.partition(b"\r\n")
        return line, lines, body


def post(body: bytes, *lines: bytes, target: bytes = b"/echo") -> bytes:
    head = b"".join(line + b"\r\n" for line in (b"Host: h", b"Content-Length: %d" % len(body), *lines))
    return b"POST %s HTTP/1.1\r\n%s\r\n%s" % (target, head, body)


def test_a_request_reaches_klein_whole() -> None:
    app = App()
    line, lines, body = app.ask(b"GET /echo?q=1&q=%32 HTTP/1.1\r\nHost: h:1\r\nCookie: a=b\r\n\r\n")
    told = json.loads(body)
    assert line == b"HTTP/1.1 200 OK"
    assert told["method"] == "GET"
    assert told["args"] == {"q": ["1", "2"]}
    assert told["uri"] == "/echo?q=1&q=%32"
    assert (told["peer"], told["host"], told["cookies"]) == ("192.0.2.1", "h:1", {"a": "b"})
    assert b"content-length: %d" % len(body) in lines.lower()
    assert b"x-request-id: r" in lines
    assert lines.lower().count(b"set-cookie") == 2
    assert b"transfer-encoding" not in lines.lower()
    assert lines.lower().count(b"content-length") == 1
    assert app.done == [200]


def test_a_head_is_a_get_without_the_body() -> None:
    app = App()
    _, lines, body = app.ask(b"HEAD /echo HTTP/1.1\r\nHost: h\r\n\r\n")
    assert body == b""
    assert int(lines.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]) > 10
    assert app.ask(b"GET /echo HTTP/1.1\r\nHost: h\r\n\r\n")[2]
    assert app.done == [200] * 2


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_up_to_the_limit(chunked: bool) -> None:
    for size in (0, 1, LIMIT):
        app = App()
        data = post(b"x" * size)
        if chunked:
            chunk = b"%x\r\n%s\r\n" % (size, b"x" * size) if size else b""
            data = b"POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n"
        assert json.loads(app.ask(data)[2])["body"] == "x" * size


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused_once(chunked: bool) -> None:
    app = App()
    data = post(b"x" * (LIMIT + 1))
    if chunked:
        data = (
            b"POST /echo HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"200\r\n%s\r\n" % (b"x" * 512) * 3
        )
    line, _, _ = app.ask(data)
    assert line == b"HTTP/1.1 413 Refused"
    app.client.receive(b"200\r\n%s\r\n0\r\n\r\n" % (b"x" * 512) if chunked else b"")
    assert app.client.take() == b""
    assert app.done == [413]


FORMS = {
    "multipart without a boundary": (b"multipart/form-data", b"x"),
    "multipart with nothing in it": (b"multipart/form-data; boundary=b", b"x"),
    "multipart cut off": (
        b"multipart/form-data; boundary=b",
        b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx',
    ),
    "multipart with bytes for a name": (
        b"multipart/form-data; boundary=b",
        b"--b\r\nContent-Disposition: form-data; name=\xff\r\n\r\nx\r\n--b--\r\n",
    ),
    "multipart without a name": (
        b"multipart/form-data; boundary=b",
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
    ),
    "a boundary of bytes": (b"multipart/form-data; boundary=\xff\xfe", b"x"),
    "urlencoded bytes": (b"application/x-www-form-urlencoded", b"%zz&=&\xff\x00=%"),
    "no media type": (b";;;", b"x"),
    "empty": (b"", b"x"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_malformed_form_gets_one_answer(name: str) -> None:
    content_type, body = FORMS[name]
    app = App()
    line, _, _ = app.ask(post(body, b"Content-Type: " + content_type))
    assert line in (b"HTTP/1.1 200 OK", b"HTTP/1.1 400 Refused")
    assert len(app.done) == 1
    assert app.ask(b"GET /echo HTTP/1.1\r\nHost: h\r\n\r\n")[0] == b"HTTP/1.1 200 OK"
    assert len(app.done) == 2


@pytest.mark.parametrize("target", [b"/wait", b"/story"])
@pytest.mark.parametrize("how", ["fin", "rst"])
def test_a_client_that_goes_cancels_the_handler(target: bytes, how: str) -> None:
    app = App()
    app.ask(b"GET %s HTTP/1.1\r\nHost: h\r\n\r\n" % target)
    assert not app.done
    (app.client.close_from_peer if how == "fin" else app.client.reset_from_peer)()
    app.clock.advance(0)
    assert app.ends[:1] == ["cancelled"]
    assert app.done == [0]
    assert not app.factory.channels


def test_a_client_that_goes_before_its_body_is_whole() -> None:
    app = App()
    app.client.receive(post(b"hello")[:-1])
    app.client.reset_from_peer()
    assert app.done == [0]


@pytest.mark.parametrize("target", [b"/wait", b"/story"])
def test_an_answer_that_takes_its_time(target: bytes) -> None:
    app = App()
    app.ask(b"GET %s HTTP/1.1\r\nHost: h\r\n\r\n" % target)
    app.waiting.callback(b"late")
    assert app.client.take().endswith(b"\r\n\r\nlate")
    assert app.done == [200]


@pytest.mark.parametrize(("target", "body"), [(b"/pieces", b"onetwo"), (b"/pulled", b"abc")])
def test_an_answer_in_pieces_goes_as_one(target: bytes, body: bytes) -> None:
    app = App()
    line, lines, received = app.ask(b"GET %s HTTP/1.1\r\nHost: h\r\n\r\n" % target)
    assert line == b"HTTP/1.1 200 OK"
    assert received == body
    assert b"content-length: %d" % len(body) in lines
    assert app.done == [200]


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_without_a_body_has_none(status: int) -> None:
    app = App()
    line, _, body = app.ask(b"GET /status/%d HTTP/1.1\r\nHost: h\r\n\r\n" % status)
    assert line.startswith(b"HTTP/1.1 %d " % status)
    assert body == b""
    assert app.ask(b"GET /echo HTTP/1.1\r\nHost: h\r\n\r\n")[0] == b"HTTP/1.1 200 OK"


def test_a_fault_tells_the_caller_nothing(logged_errors: list[LogEvent]) -> None:
    app = App()
    line, _, body = app.ask(b"GET /broken HTTP/1.1\r\nHost: h\r\n\r\n")
    assert line.startswith(b"HTTP/1.1 500 ")
    assert b"sk-secret" not in body
    assert app.done == [500]
    logged_errors.clear()


def test_requests_in_a_row_and_old_clients() -> None:
    app = App()
    app.client.receive(b"GET /echo HTTP/1.1\r\nHost: h\r\n\r\n" * 3)
    assert app.client.take().count(b"HTTP/1.1 200 OK") == 3
    line, lines, body = app.ask(b"GET /echo HTTP/1.0\r\n\r\n")
    assert line == b"HTTP/1.1 200 OK"
    assert b"connection: close" in lines
    assert json.loads(body)["host"] is None
    assert app.client.ending == "lose"


def test_what_twisted_may_ask_of_its_channel() -> None:
    app = App()
    streams: list[Stream] = []
    app.factory.handle = streams.append
    app.client.receive(b"GET /echo HTTP/1.1\r\nHost: h\r\n\r\n")
    exchange = app.exchange(streams[0])
    assert exchange.getPeer() == app.client.getPeer()
    assert exchange.getHost() == app.client.getHost()
    assert not exchange.isSecure()
    exchange.writeHeaders(b"HTTP/1.1", b"200", b"OK", Headers())
    streams[0].receiver = exchange
    exchange.loseConnection()
    exchange.abortConnection()
    app.clock.advance(0)
    assert app.done == [0]
    exchange.requestDone(None)
    exchange.client_gone(Failure(ValueError()))
