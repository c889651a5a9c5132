"""Upgrades that are no WebSocket (h2c, as stock Java clients send on every request) are served as HTTP/1.1."""

import hashlib
import json

import pytest
from _raw import chunk, connect, request
from _service import Twistd

ECHO = b"X-Vllmsim: echo"
H2C = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")
PATH = b"/vllm/v1/completions"
BODIES = {"empty": b"", "small": b'{"a":1}', "like a request": b"GET / HTTP/1.1\r\n\r\n", "large": b"x" * 300_000}
UPGRADES = {
    "h2c": H2C,
    "h2c and more": (b"Connection: keep-alive, Upgrade, HTTP2-Settings", *H2C[1:]),
    "unknown": (b"Connection: upgrade", b"Upgrade: TLS/1.0, HTCPCP/1.0"),
    "a list": (b"Connection: upgrade", b"Upgrade: h2c, foo"),
}


def check_echo(answer: bytes, method: str, body: bytes) -> None:
    """The simulator saw an ordinary request: no word of an upgrade, and the body as it was sent."""
    seen = json.loads(answer)
    assert seen["method"] == method
    names = {name.lower() for name, _ in seen["headers"]}
    assert not names & {"upgrade", "http2-settings"}
    assert not any(
        "upgrade" in value.lower() or "settings" in value.lower()
        for name, value in seen["headers"]
        if name.lower() == "connection"
    )
    assert seen["body_length"] == len(body)
    if body:
        assert seen["body_sha256"] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("pipelined", [False, True])
def test_a_post_that_offers_h2c(proxy: Twistd, body: bytes, chunked: bool, pipelined: bool) -> None:
    if chunked:
        data = request(b"POST", PATH, ECHO, *H2C, b"Transfer-Encoding: chunked")
        data += (chunk(body) if body else b"") + b"0\r\n\r\n"
    else:
        data = request(b"POST", PATH, ECHO, *H2C, body=body)
    following = request(b"POST", PATH, ECHO, body=b"following")
    with connect(proxy) as client:
        for _ in range(2):
            client.send(data + (following if pipelined else b""))
            check_echo(client.message().body, "POST", body)
            client.send(b"" if pipelined else following)
            check_echo(client.message().body, "POST", b"following")


@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
def test_a_get_that_offers_an_upgrade(proxy: Twistd, upgrade: tuple[bytes, ...]) -> None:
    with connect(proxy) as client:
        for _ in range(3):
            client.send(request(b"GET", b"/vllm/v1/models", ECHO, *upgrade))
            check_echo(client.message().body, "GET", b"")


@pytest.mark.parametrize("size", [1, 5, 64])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_offer_cut_at_any_byte(proxy: Twistd, size: int, chunked: bool) -> None:
    body = b'{"prompt": "hello"}'
    if chunked:
        data = request(b"POST", PATH, ECHO, *H2C, b"Transfer-Encoding: chunked") + chunk(body) + b"0\r\n\r\n"
    else:
        data = request(b"POST", PATH, ECHO, *H2C, body=body)
    with connect(proxy) as client:
        for i in range(0, len(data), size):
            client.send(data[i : i + size])
        check_echo(client.message().body, "POST", body)
        client.send(request(b"GET", b"/vllm/v1/models", ECHO))
        check_echo(client.message().body, "GET", b"")


@pytest.mark.parametrize("method", [b"POST", b"PUT"])
def test_a_body_with_a_websocket_offer_is_no_tunnel(proxy: Twistd, method: bytes) -> None:
    """A WebSocket handshake is a GET without a body (RFC 6455 §4.1): refused, or served without the offer."""
    offer = (b"Connection: Upgrade", b"Upgrade: websocket")
    with connect(proxy) as client:
        client.send(request(method, PATH, ECHO, *offer, body=b"body"))
        answer = client.message()
        if answer.status != 400:
            check_echo(answer.body, method.decode(), b"body")


def test_a_malformed_chunk_behind_an_offer_is_refused(proxy: Twistd) -> None:
    with connect(proxy) as client:
        client.send(request(b"POST", PATH, ECHO, *H2C, b"Transfer-Encoding: chunked") + b"xyz\r\n\r\n")
        assert client.message().status == 400
        assert client.rest()[0] == b""


def test_expect_and_h2c_together(proxy: Twistd) -> None:
    with connect(proxy) as client:
        client.send(request(b"POST", PATH, ECHO, *H2C, b"Expect: 100-continue", b"Content-Length: 4"))
        assert client.head().status == 100
        client.send(b"body")
        check_echo(client.message().body, "POST", b"body")
