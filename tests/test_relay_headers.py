"""What of a head passes, in both directions."""

import re
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.http1.message import RequestHead, ResponseHead, fields_of
from vllmproxy.http1.rules import check_request
from vllmproxy.relay.headers import Client, TrustedProxies, answer_lines, around_of, request_id_in, request_lines
from vllmproxy.upstreams.upstream import Upstream

UPSTREAM = Upstream.parse("http://gpu1:8000")
STRANGER = Client("192.0.2.1", "192.0.2.1", False)
TRUSTED = Client("203.0.113.9", "192.0.2.1", True)


def head_of(*headers: tuple[bytes, bytes], method: bytes = b"POST", version: tuple[int, int] = (1, 1)) -> RequestHead:
    lines = [(b"Host", b"proxy:4000"), *headers]
    head = RequestHead(method, b"/vllm/x", version, lines, fields_of(lines))
    check_request(head)
    return head


def lines_of(data: bytes) -> list[tuple[bytes, bytes]]:
    """Parse header lines strictly."""
    assert data.endswith(b"\r\n")
    found = []
    for line in data.removesuffix(b"\r\n").split(b"\r\n"):
        match = re.fullmatch(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ([^\r\n\x00]*)", line)
        assert match is not None, line
        found.append((match[1], match[2]))
    return found


def forwarded(head: RequestHead, client: Client = STRANGER, authorization: bytes = b"", secure: bool = False) -> bytes:
    return request_lines(head, around_of(head, client, secure, authorization, host=b"gpu1:8000"), b"id-1")


def test_what_is_added() -> None:
    assert lines_of(forwarded(head_of())) == [
        (b"host", b"gpu1:8000"),
        (b"x-request-id", b"id-1"),
        (b"x-forwarded-proto", b"http"),
        (b"x-forwarded-host", b"proxy:4000"),
        (b"x-forwarded-for", b"192.0.2.1"),
        (b"via", b"1.1 vllmproxy"),
    ]
    lines = lines_of(forwarded(head_of(version=(1, 0)), authorization=b"authorization: Bearer up\r\n", secure=True))
    assert (b"authorization", b"Bearer up") in lines
    assert (b"x-forwarded-proto", b"https") in lines
    assert (b"via", b"1.0 vllmproxy") in lines


def test_a_body_may_go_with_another_length() -> None:
    head = head_of((b"Content-Length", b"5"))
    around = around_of(head, STRANGER, False, b"", host=b"gpu1:8000")
    assert (b"content-length", b"7") in lines_of(request_lines(head, around, b"id-1", 7))


def test_what_passes_passes_as_it_is_and_in_order() -> None:
    sent = [
        (b"ACCEPT", b"*/*"),
        (b"Content-Type", b'multipart/form-data; boundary="x"'),
        (b"X-Twice", b"1"),
        (b"Cookie", b"a=b"),
        (b"x-twice", b"\xff"),
        (b"Accept-Encoding", b"gzip"),
        (b"Content-Encoding", b"gzip"),
        (b"traceparent", b"00-1"),
        (b"endpoint-load-metrics-format", b"json"),
        (b"Empty", b""),
        (b"anthropic-version", b"2023-06-01"),
    ]
    assert lines_of(forwarded(head_of(*sent)))[1:-5] == sent


@pytest.mark.parametrize(
    ("headers", "framing"),
    [
        ([(b"Content-Length", b"007")], [(b"content-length", b"7")]),
        ([(b"CONTENT-LENGTH", b"0")], [(b"content-length", b"0")]),
        ([(b"Transfer-Encoding", b"CHUNKED")], [(b"transfer-encoding", b"chunked")]),
        ([], []),
    ],
)
def test_framing_is_said_once(headers: list[tuple[bytes, bytes]], framing: list[tuple[bytes, bytes]]) -> None:
    lines = lines_of(forwarded(head_of(*headers)))
    names = (b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"expect")
    assert [line for line in lines if line[0].lower() in names] == framing


def test_a_websocket_handshake_passes() -> None:
    head = head_of(
        (b"Connection", b"keep-alive, Upgrade"), (b"Upgrade", b"websocket"), (b"Sec-WebSocket-Key", b"x"), method=b"GET"
    )
    lines = lines_of(forwarded(head))
    assert [line for line in lines if line[0].lower() in (b"connection", b"upgrade", b"sec-websocket-key")] == [
        (b"Sec-WebSocket-Key", b"x"),
        (b"connection", b"Upgrade"),
        (b"upgrade", b"websocket"),
    ]


NEVER = [
    b"authorization",
    b"api-key",
    b"x-api-key",
    b"x-litellm-api-key",
    b"proxy-authorization",
    b"x-data-parallel-rank",
    b"x-session-id",
    b"x-vllm-priority",
    b"keep-alive",
    b"te",
    b"trailer",
    b"proxy-connection",
    b"http2-settings",
    b"forwarded",
    b"x-real-ip",
    b"x-forwarded-port",
    b"x-forwarded-prefix",
    b"x-forwarded-server",
    b"x-forwarded-for",
    b"x-forwarded-host",
    b"x-forwarded-proto",
    b"via",
    b"expect",
    b"upgrade",
    b"host",
    b"x-request-id",
]


def any_case(name: bytes) -> st.SearchStrategy[bytes]:
    """The name in any mix of cases."""
    text = name.decode()
    return st.lists(st.booleans(), min_size=len(text), max_size=len(text)).map(
        lambda ups: "".join(c.upper() if up else c for c, up in zip(text, ups, strict=True)).encode()
    )


SECRET = b"sk-secret-secret-secret"
FORBIDDEN = st.sampled_from([name for name in NEVER if name not in (b"expect", b"host")]).flatmap(any_case)
HARMLESS = st.sampled_from([b"Accept", b"X-Custom", b"cookie", b"X-Api-Keys", b"Authorizations"])


@given(
    st.lists(st.one_of(st.tuples(FORBIDDEN, st.just(SECRET)), st.tuples(HARMLESS, st.just(b"fine"))), max_size=8),
    st.sampled_from([(1, 0), (1, 1)]),
)
def test_no_credential_and_no_forbidden_header_leaves(
    headers: list[tuple[bytes, bytes]], version: tuple[int, int]
) -> None:
    data = forwarded(head_of(*headers, version=version))
    assert SECRET not in data
    assert [line for line in lines_of(data) if line[1] == b"fine"] == [line for line in headers if line[1] == b"fine"]


@given(
    st.lists(st.sampled_from([b"X-Hop", b"x-api-key", b"Content-Type", b"host", b"content-length", b"via"]), max_size=4)
)
def test_what_connection_names_does_not_pass(names: list[bytes]) -> None:
    head = head_of(
        (b"Connection", b", ".join(names)),
        (b"connection", b"close"),
        (b"x-hop", b"hop"),
        (b"content-type", b"text/plain"),
        (b"Content-Length", b"3"),
        (b"X-End", b"end"),
    )
    fields = fields_of(lines_of(forwarded(head)))
    assert (b"x-hop" in fields) is (b"X-Hop" not in names)
    assert (b"content-type" in fields) is (b"Content-Type" not in names)
    assert fields[b"x-end"] == [b"end"]
    assert fields[b"host"] == [b"gpu1:8000"]
    assert fields[b"content-length"] == [b"3"]
    assert fields[b"via"] == [b"1.1 vllmproxy"]
    assert b"connection" not in fields


def test_a_trusted_proxy_is_believed() -> None:
    head = head_of(
        (b"X-Forwarded-For", b"203.0.113.9"),
        (b"X-Forwarded-Proto", b"https"),
        (b"X-Forwarded-Host", b"api.example"),
        (b"Via", b"2 front"),
        (b"Forwarded", b"for=203.0.113.9"),
        (b"Authorization", SECRET),
        (b"X-Vllm-Priority", b"1"),
    )
    fields = fields_of(lines_of(forwarded(head, TRUSTED)))
    assert fields[b"x-forwarded-for"] == [b"203.0.113.9, 192.0.2.1"]
    assert fields[b"x-forwarded-proto"] == [b"https"]
    assert fields[b"x-forwarded-host"] == [b"api.example"]
    assert fields[b"via"] == [b"2 front, 1.1 vllmproxy"]
    assert fields[b"forwarded"] == [b"for=203.0.113.9"]
    assert b"authorization" not in fields
    assert b"x-vllm-priority" not in fields


def test_what_a_trusted_proxy_did_not_say_is_said_for_it() -> None:
    fields = fields_of(lines_of(forwarded(head_of(), TRUSTED)))
    assert fields[b"x-forwarded-for"] == [b"192.0.2.1"]
    assert fields[b"x-forwarded-proto"] == [b"http"]
    assert fields[b"x-forwarded-host"] == [b"proxy:4000"]


def test_a_client_on_a_unix_socket() -> None:
    fields = fields_of(lines_of(forwarded(head_of(), Client("", "", False))))
    assert fields[b"x-forwarded-for"] == [b"unknown"]


TEN = TrustedProxies((ip_network("10.0.0.0/8"), ip_network("fd00::/8")))


@pytest.mark.parametrize(
    ("peer", "chain", "address", "trusted"),
    [
        ("192.0.2.1", [], "192.0.2.1", False),
        ("192.0.2.1", [b"1.1.1.1"], "192.0.2.1", False),
        ("10.0.0.1", [], "10.0.0.1", True),
        ("10.0.0.1", [b"1.1.1.1"], "1.1.1.1", True),
        ("10.0.0.1", [b"6.6.6.6, 1.1.1.1"], "1.1.1.1", True),
        ("10.0.0.1", [b"6.6.6.6, 1.1.1.1, 10.9.9.9"], "1.1.1.1", True),
        ("10.0.0.1", [b"6.6.6.6", b"1.1.1.1", b"10.9.9.9 ,10.8.8.8"], "1.1.1.1", True),
        ("10.0.0.1", [b"10.2.2.2, 10.3.3.3"], "10.0.0.1", True),
        ("::ffff:10.0.0.1", [b"1.1.1.1"], "1.1.1.1", True),
        ("fd00::1", [b"2001:db8::1"], "2001:db8::1", True),
        ("10.0.0.1", [b"nonsense"], "10.0.0.1", True),
        ("10.0.0.1", [b"1.1.1.1, \xff"], "10.0.0.1", True),
        ("10.0.0.1", [b""], "10.0.0.1", True),
        ("", [b"1.1.1.1"], "", False),
    ],
)
def test_who_the_client_is(peer: str, chain: list[bytes], address: str, trusted: bool) -> None:
    head = head_of(*[(b"X-Forwarded-For", value) for value in chain])
    assert TEN.client(peer, head) == Client(address, peer, trusted)


@given(peer=st.one_of(st.ip_addresses().map(str), st.text(max_size=10)), chain=st.binary(max_size=40))
def test_any_chain_gives_an_address(peer: str, chain: bytes) -> None:
    chain = chain.replace(b"\x00", b"").replace(b"\r", b"").replace(b"\n", b"")
    client = TEN.client(peer, head_of((b"X-Forwarded-For", chain)))
    assert client.trusted or client.address == peer
    nobody = TrustedProxies(()).client(peer, head_of((b"X-Forwarded-For", chain)))
    assert nobody == Client(peer, peer, False)


@pytest.mark.parametrize("given_id", [b"a", b"A-b_c.d:9", b"x" * 128])
def test_a_sane_request_id_is_kept(given_id: bytes) -> None:
    assert request_id_in(head_of((b"X-Request-ID", given_id)).fields) == given_id


@pytest.mark.parametrize("given_ids", [[], [b""], [b"x" * 129], [b"a b"], [b"a\xff"], [b"a", b"b"], [b'"a"'], [b"a\n"]])
def test_other_request_ids_are_replaced(given_ids: list[bytes]) -> None:
    assert request_id_in(head_of(*[(b"X-Request-ID", value) for value in given_ids]).fields) is None


def answered(*headers: tuple[bytes, bytes], status: int = 200) -> list[tuple[bytes, bytes]]:
    return lines_of(answer_lines(ResponseHead(status, b"OK", list(headers)), b"id-1", UPSTREAM))


def test_an_answers_lines_pass_as_they_are() -> None:
    sent = [
        (b"Server", b"uvicorn"),
        (b"DATE", b"today"),
        (b"Set-Cookie", b"a"),
        (b"set-cookie", b"b"),
        (b"Content-Encoding", b"gzip"),
        (b"metadata", b"m" * 65_536),
        (b"Via", b"1.1 inner"),
        (b"Access-Control-Allow-Origin", b"*"),
        (b"WWW-Authenticate", b"Bearer"),
    ]
    assert answered(*sent) == [*sent, (b"x-request-id", b"id-1"), (b"via", b"1.1 vllmproxy")]


def test_an_answers_hop_by_hop_lines_stay_behind() -> None:
    lines = answered(
        (b"Connection", b"close, X-Hop"),
        (b"connection", b"x-other"),
        (b"Keep-Alive", b"timeout=5"),
        (b"x-hop", b"1"),
        (b"X-Other", b"1"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Content-Length", b"1"),
        (b"Trailer", b"T"),
        (b"Upgrade", b"h2c"),
        (b"X-Request-Id", b"theirs"),
        (b"X-Kept", b"1"),
    )
    assert lines == [(b"X-Kept", b"1"), (b"x-request-id", b"id-1"), (b"via", b"1.1 vllmproxy")]


def test_every_location_is_made_local() -> None:
    lines = answered((b"LOCATION", b"http://gpu1:8000/v1/x"), (b"location", b"/y"))
    assert lines[:2] == [(b"LOCATION", b"/vllm/v1/x"), (b"location", b"/vllm/y")]


def test_a_switch_of_protocols_says_so() -> None:
    lines = answered(
        (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), (b"Sec-WebSocket-Accept", b"x"), status=101
    )
    assert lines[:3] == [(b"Sec-WebSocket-Accept", b"x"), (b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
