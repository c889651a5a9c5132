"""Attacks that worked once: each is a request or an answer that must not do again what it did."""

import pytest
from _memory import OK, Upstream
from _raw import connect
from _service import Twistd
from _wire import ask

FORMS = {
    "an odd parameter": (b"a/b;a*", b"x"),
    "nested brackets": (b"a/b; " + b"(" * 2000, b"x"),
    "many parameters": (b"a/b" + b";" * 20_000, b"x"),
    "an odd part": (
        b"multipart/form-data; boundary=B",
        b"\r\n--B\r\nContent-Disposition: form-data; name*=utf-8''x\r\n\r\nx\r\n--B--\r\n",
    ),
    "no boundary": (b"multipart/form-data", b"x"),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_not_parsed_for_anybody(proxy: Twistd, name: str) -> None:
    """twisted.web parses them before a key is asked for: in quadratic time, and raising what nobody catches."""
    content_type, body = FORMS[name]
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (content_type, len(body))
    with connect(proxy) as client:
        client.send(head + body)
        assert client.head().status == 404
    assert "Traceback" not in proxy.log


INFORMED = {
    "a body by length": b"HTTP/1.1 150 X\r\nContent-Length: 4\r\n\r\nEVIL",
    "a chunked body": b"HTTP/1.1 110 X\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nEVIL\r\n0\r\n\r\n",
    "too many": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100,
    "a blank behind the coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\t\r\n\r\n",
    "a control in the reason": b"HTTP/1.1 200 O\x1b[31mK\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("name", INFORMED)
def test_an_answer_that_two_could_read_differently_is_refused(name: str) -> None:
    upstream = Upstream()
    pending = upstream.ask()
    upstream.wires[0].receive(INFORMED[name] + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert pending.answer is None
    assert pending.error is not None
    assert upstream.wires[0].ending == "abort"


def test_a_connection_is_not_used_again_after_head_announced_a_body() -> None:
    """The body could come late, and would be taken for the next request's answer."""
    upstream = Upstream()
    upstream.ask(b"HEAD")
    upstream.wires[0].receive(OK.removesuffix(b"ok"))
    assert upstream.wires[0].ending == "abort"
    upstream.ask(b"GET")
    assert len(upstream.wires) == 2


@pytest.mark.parametrize("header", ["X-Forwarded-Proto: https", "X-Forwarded-Port: 1", "X-Forwarded-Server: a"])
def test_who_was_forwarded_is_not_on_loopback(proxy: Twistd, header: str) -> None:
    assert ask(proxy, "/metrics", header, key=None).status == 401
