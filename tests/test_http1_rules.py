"""Which heads the rules accept, as RFC 9110 and RFC 9112 have it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.http1.message import BadAnswer, RequestHead, ResponseHead, WireError, fields_of
from vllmproxy.http1.rules import METHODS, check_request, check_response

HOST = (b"Host", b"proxy:4000")


def head_of(
    *headers: tuple[bytes, bytes],
    method: bytes = b"POST",
    target: bytes = b"/vllm/x",
    version: tuple[int, int] = (1, 1),
    host: bool = True,
) -> RequestHead:
    lines = [HOST, *headers] if host else list(headers)
    return RequestHead(method, target, version, lines, fields_of(lines))


def refusal(head: RequestHead) -> int:
    with pytest.raises(WireError) as caught:
        check_request(head)
    assert caught.value.message
    return caught.value.status


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("version", [(1, 0), (1, 1)])
def test_methods(method: bytes, version: tuple[int, int]) -> None:
    head = head_of(method=method, version=version)
    check_request(head)
    assert not head.has_body
    assert head.keep_alive is (version == (1, 1))


@pytest.mark.parametrize("method", [b"CONNECT", b"TRACE", b"get", b"PROPFIND", b"", b"GET "])
def test_other_methods_are_refused(method: bytes) -> None:
    assert refusal(head_of(method=method)) == 405


@pytest.mark.parametrize("version", [(0, 9), (1, 2), (2, 0), (3, 1)])
def test_other_versions_are_refused(version: tuple[int, int]) -> None:
    assert refusal(head_of(version=version)) == 505


@pytest.mark.parametrize(
    ("headers", "length", "chunked"),
    [
        ([], None, False),
        ([(b"Content-Length", b"0")], 0, False),
        ([(b"content-LENGTH", b"00012")], 12, False),
        ([(b"Content-Length", b"9" * 18)], 10**18 - 1, False),
        ([(b"Transfer-Encoding", b"chunked")], None, True),
        ([(b"TRANSFER-encoding", b"Chunked")], None, True),
    ],
)
def test_framing(headers: list[tuple[bytes, bytes]], length: int | None, chunked: bool) -> None:
    head = head_of(*headers)
    check_request(head)
    assert (head.content_length, head.chunked) == (length, chunked)
    assert head.has_body is (chunked or bool(length))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b"Content-Length", b"1"), (b"Transfer-Encoding", b"chunked")], 400),
        ([(b"Content-Length", b"1"), (b"Content-Length", b"1")], 400),
        ([(b"Content-Length", b"1, 1")], 400),
        ([(b"Content-Length", b"+1")], 400),
        ([(b"Content-Length", b"-1")], 400),
        ([(b"Content-Length", b"0x1")], 400),
        ([(b"Content-Length", b"1_0")], 400),
        ([(b"Content-Length", "\u0661".encode())], 400),
        ([(b"Content-Length", b"")], 400),
        ([(b"Content-Length", b"1\n")], 400),
        ([(b"Content-Length", b"9" * 19)], 400),
        ([(b"Content-Length", b"1" * 5000)], 400),
        ([(b"Transfer-Encoding", b"chunked"), (b"Transfer-Encoding", b"chunked")], 400),
        ([(b"Transfer-Encoding", b"gzip, chunked")], 501),
        ([(b"Transfer-Encoding", b"chunked, chunked")], 501),
        ([(b"Transfer-Encoding", b"identity")], 501),
        ([(b"Transfer-Encoding", b"")], 501),
        ([(b"Transfer-Encoding", b"chunked\x0b")], 501),
    ],
)
def test_framing_that_two_readers_could_take_differently(headers: list[tuple[bytes, bytes]], status: int) -> None:
    assert refusal(head_of(*headers)) == status


def test_transfer_encoding_does_not_exist_in_http_1_0() -> None:
    assert refusal(head_of((b"Transfer-Encoding", b"chunked"), version=(1, 0))) == 400


@pytest.mark.parametrize(
    "host",
    [b"h", b"h:1", b"h:", b"", b"a,b:", b"[::1]", b"[::1]:80", b"127.0.0.1:65535", b"a.b-c_d~e", b"%41.example"],
)
def test_hosts(host: bytes) -> None:
    check_request(head_of((b"Host", host), host=False))


@pytest.mark.parametrize(
    "host",
    [
        b"a b",
        b"h:x",
        b"h:123456",
        b"a/b",
        b"u@h",
        b"[::1",
        b"::1",
        b"h\x00",
        b"h#",
        b"h?",
        b"\xc3\xa9",
        b"h\n",
        b"h%zz",
        b"h%4",
        b":80",
    ],
)
def test_malformed_hosts(host: bytes) -> None:
    assert refusal(head_of((b"Host", host), host=False)) == 400


def test_exactly_one_host() -> None:
    assert refusal(head_of(host=False)) == 400
    assert refusal(head_of((b"host", b"proxy:4000"))) == 400
    assert refusal(head_of((b"host", b"x"), version=(1, 0))) == 400
    check_request(head_of(host=False, version=(1, 0)))


@pytest.mark.parametrize(
    ("target", "reduced"),
    [
        (b"/", b"/"),
        (b"/vllm/v1/x?a=1&a=%31&b", b"/vllm/v1/x?a=1&a=%31&b"),
        (b"/%C3%A9//x/../y;z", b"/%C3%A9//x/../y;z"),
        (b"http://proxy:4000/vllm/x?y", b"/vllm/x?y"),
        (b"HTTPS://PROXY:4000", b"/"),
        (b"http://proxy:4000?q=/", b"/?q=/"),
    ],
)
def test_targets(target: bytes, reduced: bytes) -> None:
    head = head_of(target=target)
    check_request(head)
    assert head.target == reduced


@pytest.mark.parametrize(
    "target",
    [
        b"",
        b"*",
        b"vllm/x",
        b"/x#fragment",
        b"/x y",
        b"/\x80",
        b"/\xc3\xa9",
        b"/x\x00",
        b"/x\x7f",
        b"/x\n",
        b"http://other/vllm/x",
        b"http://proxy/vllm/x",
        b"http://user@proxy:4000/vllm/x",
        b"ftp://proxy:4000/x",
        b"proxy:4000",
        b"?x",
    ],
)
def test_other_targets_are_refused(target: bytes) -> None:
    assert refusal(head_of(target=target)) == 400


def test_an_absolute_target_with_an_empty_host_is_refused() -> None:
    """RFC 9110 §4.2.1: a recipient must reject an http URI with an empty host."""
    assert refusal(head_of((b"Host", b""), target=b"http:///vllm/x", host=False)) == 400


@pytest.mark.parametrize(
    "name",
    [
        b"Content_Length",
        b"transfer_encoding",
        b"X_Api-Key",
        b"x-api_key",
        b"API_KEY",
        b"x_forwarded_for",
        b"X_Real_IP",
        b"X-Forwarded_Prefix",
        b"Content_Type",
        b"content_encoding",
        b"X_Vllm_Priority",
    ],
)
def test_look_alikes_are_refused(name: bytes) -> None:
    assert refusal(head_of((name, b"1"))) == 400


def test_other_underscores_pass() -> None:
    check_request(head_of((b"x_custom", b"1"), (b"_", b"1")))


@pytest.mark.parametrize("value", [b"100-continue", b"100-Continue"])
def test_expect(value: bytes) -> None:
    head = head_of((b"Expect", value), (b"Content-Length", b"3"))
    check_request(head)
    assert head.expects_continue
    old = head_of((b"Expect", value), (b"Content-Length", b"3"), version=(1, 0))
    check_request(old)
    assert not old.expects_continue
    bodiless = head_of((b"Expect", value))
    check_request(bodiless)
    assert not bodiless.expects_continue


@pytest.mark.parametrize("values", [[b"200-ok"], [b""], [b"100-continue, x"], [b"100-continue"] * 2])
def test_other_expectations_are_refused(values: list[bytes]) -> None:
    assert refusal(head_of(*[(b"Expect", value) for value in values])) == 417


@pytest.mark.parametrize(
    ("connection", "version", "kept"),
    [
        ([], (1, 1), True),
        ([b"close"], (1, 1), False),
        ([b"Keep-Alive, CLOSE"], (1, 1), False),
        ([b"x", b" close "], (1, 1), False),
        ([b"closed"], (1, 1), True),
        ([], (1, 0), False),
        ([b"keep-alive"], (1, 0), True),
        ([b"keep-alive, close"], (1, 0), False),
    ],
)
def test_keep_alive(connection: list[bytes], version: tuple[int, int], kept: bool) -> None:
    head = head_of(*[(b"Connection", value) for value in connection], version=version)
    check_request(head)
    assert head.keep_alive is kept


@pytest.mark.parametrize("version", [(1, 1), (1, 0)])
def test_proxy_connection_closes_as_llhttp_has_it(version: tuple[int, int]) -> None:
    head = head_of((b"Connection", b"keep-alive"), (b"Proxy-Connection", b"x, Close"), version=version)
    check_request(head)
    assert not head.keep_alive


def test_only_a_websocket_handshake_may_tunnel() -> None:
    def websocket(
        *values: bytes, method: bytes = b"GET", connection: bytes = b"x, Upgrade", version: tuple[int, int] = (1, 1)
    ) -> bool:
        lines = [(b"Upgrade", value) for value in values] + [(b"Connection", connection)]
        head = head_of(*lines, method=method, version=version)
        check_request(head)
        return head.websocket

    assert websocket(b"WebSocket")
    assert not websocket(b"h2c")
    assert not websocket(b"websocket, h2c")
    assert not websocket(b"websocket", b"websocket")
    assert not websocket(b"websocket", method=b"POST")
    assert not websocket(b"websocket", connection=b"close")
    assert not websocket(b"websocket", version=(1, 0))
    with_body = [(b"Upgrade", b"websocket"), (b"Connection", b"upgrade"), (b"Content-Length", b"1")]
    assert refusal(head_of(*with_body, method=b"GET")) == 400


NAMES = st.sampled_from(
    [b"Host", b"Content-Length", b"Transfer-Encoding", b"Connection", b"Upgrade", b"Expect", b"X_Api_Key", b"X"]
)
VALUES = st.one_of(
    st.binary(max_size=12),
    st.sampled_from([b"chunked", b"close", b"websocket", b"upgrade", b"100-continue", b"1", b"01", b"h", b""]),
)
LINES = st.lists(st.tuples(st.one_of(NAMES, st.binary(min_size=1, max_size=6)), VALUES), max_size=6)


@given(
    method=st.one_of(st.sampled_from(sorted(METHODS)), st.binary(max_size=5)),
    target=st.one_of(st.sampled_from([b"/", b"http://h/x", b"*"]), st.binary(max_size=12)),
    version=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    lines=LINES,
)
def test_a_request_is_refused_in_one_way_only(
    method: bytes, target: bytes, version: tuple[int, int], lines: list[tuple[bytes, bytes]]
) -> None:
    head = RequestHead(method, target, version, lines, fields_of(lines))
    try:
        check_request(head)
    except WireError:
        return
    assert head.target.startswith(b"/")
    assert head.target.isascii()
    assert not (head.chunked and head.content_length is not None)
    assert not (head.websocket and head.has_body)


@pytest.mark.parametrize(
    ("status", "method", "headers", "framing"),
    [
        (200, b"GET", [], (None, False, False)),
        (200, b"GET", [(b"content-length", b"5")], (5, False, False)),
        (200, b"GET", [(b"Transfer-Encoding", b"CHUNKED")], (None, True, False)),
        (200, b"HEAD", [(b"Content-Length", b"5")], (5, False, True)),
        (204, b"POST", [], (None, False, True)),
        (304, b"GET", [(b"Content-Length", b"5")], (5, False, True)),
        (103, b"GET", [(b"Link", b"x")], (None, False, True)),
        (101, b"GET", [], (None, False, True)),
        (599, b"GET", [], (None, False, False)),
    ],
)
def test_answers(
    status: int, method: bytes, headers: list[tuple[bytes, bytes]], framing: tuple[int | None, bool, bool]
) -> None:
    head = ResponseHead(status, b"", headers)
    check_response(head, method)
    assert (head.content_length, head.chunked, head.bodiless) == framing


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (99, []),
        (600, []),
        (0, []),
        (200, [(b"Content-Length", b"1"), (b"Transfer-Encoding", b"chunked")]),
        (200, [(b"Content-Length", b"1"), (b"content-length", b"1")]),
        (200, [(b"Content-Length", b"1, 1")]),
        (200, [(b"Content-Length", b"")]),
        (200, [(b"Content-Length", b"-1")]),
        (200, [(b"Transfer-Encoding", b"gzip, chunked")]),
        (200, [(b"Transfer-Encoding", b"chunked"), (b"Transfer-Encoding", b"chunked")]),
    ],
)
def test_answers_that_may_not_pass(status: int, headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(BadAnswer):
        check_response(ResponseHead(status, b"", headers), b"GET")


def test_an_answer_in_http_1_0_has_no_transfer_encoding() -> None:
    """RFC 9112 §6.1: its framing is to be treated as faulty."""
    head = ResponseHead(200, b"OK", [(b"Transfer-Encoding", b"chunked")], b"1.0")
    with pytest.raises(BadAnswer):
        check_response(head, b"GET")


@given(status=st.integers(0, 999), method=st.sampled_from([b"GET", b"HEAD"]), lines=LINES)
def test_an_answer_is_refused_in_one_way_only(status: int, method: bytes, lines: list[tuple[bytes, bytes]]) -> None:
    head = ResponseHead(status, b"", lines)
    try:
        check_response(head, method)
    except BadAnswer:
        return
    assert not (head.chunked and head.content_length is not None)
