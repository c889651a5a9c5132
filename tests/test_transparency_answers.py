"""Answers are vLLM's own: status, reason, headers and framing, with x-request-id and via added and nothing else."""

import pytest
from _service import Twistd
from _wire import ask, compare, request, wire

#: The same id both ways, so that what vLLM derives from it is the same too.
ID = "X-Request-Id: the-same"
JSON = "Content-Type: application/json"


def both(proxy: Twistd, sim: Twistd, path: str, *lines: str, method: str = "GET", chunked: bool = False) -> None:
    """Compare the answer by way of the proxy with the direct one."""
    direct = ask(sim, path, ID, *lines, method=method)
    compare(ask(proxy, "/vllm" + path, ID, *lines, method=method), direct, chunked=chunked)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize(
    "path", ["/health", "/version", "/v1/nothing", "/v1/chat/completions", "/openapi.json", "/ping"]
)
def test_the_answer_is_vllms_own(proxy: Twistd, sim: Twistd, method: str, path: str) -> None:
    both(proxy, sim, path, method=method)


def test_a_chat_completion_is_vllms_own(proxy: Twistd, sim: Twistd) -> None:
    body = b'{"model":"qwen2.5-7b-instruct","messages":[{"role":"user","content":"hi"}],"max_tokens":2}'
    direct = ask(sim, "/v1/chat/completions", ID, JSON, method="POST", body=body)
    ours = ask(proxy, "/vllm/v1/chat/completions", ID, JSON, method="POST", body=body)
    assert ours.status == 200
    first, second = direct.json(), ours.json()
    assert abs(first.pop("created") - second.pop("created")) < 60
    assert first == second
    assert [line[0] for line in ours.headers if line[0] not in (b"x-request-id", b"via", b"content-length")] == [
        line[0] for line in direct.headers if line[0] != b"content-length"
    ]


def test_only_two_headers_are_added(proxy: Twistd, sim: Twistd) -> None:
    direct, ours = ask(sim, "/v1/nothing"), ask(proxy, "/vllm/v1/nothing")
    new = {name for name, _ in ours.headers} - {name for name, _ in direct.headers}
    assert {name for name in new if not name.startswith(b"x-vllmproxy-")} == {b"x-request-id", b"via"}
    assert len({name.lower() for name, _ in ours.headers}) == len(ours.headers)


def test_server_and_date_are_vllms(proxy: Twistd) -> None:
    odd = "Thu, 01 Jan 1970 00:00:00 GMT"
    answer = ask(proxy, "/vllm/v1/models")
    assert answer.get("server") == b"uvicorn"
    assert answer.get("date")
    # The simulated vLLM sends these lines besides its own two: they come as they are.
    answer = ask(proxy, "/vllm/v1/x", f"X-Vllmsim: status; code=200; header=Date:{odd}; header=Server:mine")
    assert answer.all("date")[1:] == [odd.encode()]
    assert answer.all("server") == [b"uvicorn", b"mine"]


@pytest.mark.parametrize(
    "status", [200, 201, 202, 206, 226, 299, 300, 302, 303, 308, 400, 402, 418, 451, 499, 500, 599]
)
def test_any_status_passes(proxy: Twistd, sim: Twistd, status: int) -> None:
    both(proxy, sim, "/v1/x", f"X-Vllmsim: status; code={status}; reason=A  Reason (of its own)!")


@pytest.mark.parametrize("reason", ["", "I'm a teapot", "OK, but: odd", "x" * 500, "Tr\xe8s bien"])
def test_the_reason_phrase_passes(proxy: Twistd, sim: Twistd, reason: str) -> None:
    both(proxy, sim, "/v1/x", f"X-Vllmsim: status; code=200; reason={reason}")


def test_header_lines_pass_in_order_in_case_and_as_often_as_sent(proxy: Twistd, sim: Twistd) -> None:
    wanted = (
        "X-Zebra:1",
        "x-apple:2",
        "X-ZEBRA:3",
        "Set-Cookie:a=1",
        "set-cookie:b=2, c",
        "X-Empty:",
        "WWW-Authenticate:Bearer",
        'ETag:W/"x"',
        "Cache-Control:no-store",
        "Access-Control-Allow-Origin:*",
        "X-Latin:caf\xe9",
        "X_Under:score",
        "Content-Location:/v1/x",
        "Link:</v1/x>",
        "Alt-Svc:clear",
        "Strict-Transport-Security:max-age=1",
        "Via:1.1 inner",
    )
    line = "X-Vllmsim: status; code=200; " + "; ".join(f"header={header}" for header in wanted)
    direct, ours = ask(sim, "/v1/x", line), ask(proxy, "/vllm/v1/x", line)
    names = {header.partition(":")[0].lower().encode() for header in wanted} - {b"via"}
    kept = [pair for pair in ours.headers if pair[0].lower() in names]
    assert kept == [pair for pair in direct.headers if pair[0].lower() in names]
    assert len(kept) == len(wanted) - 1
    chain = b", ".join(ours.all("via"))
    assert chain.startswith(b"1.1 inner")
    assert b"vllmproxy" in chain


def test_two_cookies_stay_two(proxy: Twistd) -> None:
    line = "X-Vllmsim: status; code=200; set-cookie=a=1, Path=/; set-cookie=b=2"
    assert ask(proxy, "/vllm/v1/x", line).all("set-cookie") == [b"a=1, Path=/", b"b=2"]


@pytest.mark.parametrize("name", ["Keep-Alive", "Proxy-Authenticate", "Trailer", "Upgrade", "Proxy-Connection"])
def test_the_hops_own_headers_of_an_answer_stay(proxy: Twistd, name: str) -> None:
    answer = ask(proxy, "/vllm/v1/x", f"X-Vllmsim: status; code=200; header={name}:x; header=X-Kept:1")
    assert answer.all(name.lower()) == []
    assert answer.get("x-kept") == b"1"


def test_what_connection_names_in_an_answer_stays(proxy: Twistd) -> None:
    line = "X-Vllmsim: status; code=200; header=Connection:X-Secret; header=x-secret:1; header=X-Kept:1"
    answer = ask(proxy, "/vllm/v1/x", line)
    assert answer.all("x-secret") == []
    assert answer.get("x-kept") == b"1"


@pytest.mark.parametrize("size", [1, 16_384, 65_536, 200_000])
def test_a_large_metadata_header_passes(proxy: Twistd, size: int) -> None:
    answer = ask(proxy, "/vllm/pooling", f"X-Vllmsim: headers; size={size}", method="POST", body=b"{}")
    assert answer.get("metadata") == b"m" * size
    assert answer.body == b"{}"


# without a body


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_content_and_not_modified(proxy: Twistd, sim: Twistd, status: int, method: str) -> None:
    line = f'X-Vllmsim: status; code={status}; header=ETag:"x"'
    both(proxy, sim, "/v1/x", line, method=method)
    with wire(proxy) as connection:
        connection.send(request("/vllm/v1/x", line, method=method))
        answer = connection.answer(method)
        assert (answer.get("content-length"), answer.get("transfer-encoding")) == (None, None)
        # A byte of a body would be taken for the beginning of the next answer.
        connection.send(request("/vllm/version"))
        assert connection.answer().json() == {"version": "0.32.0"}


def test_not_modified_may_tell_the_length_of_what_it_does_not_send(proxy: Twistd) -> None:
    with wire(proxy) as connection:
        connection.send(request("/vllm/v1/x", "X-Vllmsim: status; code=304; header=Content-Length:500"))
        assert connection.answer().get("content-length") == b"500"
        connection.send(request("/vllm/version"))
        assert connection.answer().json() == {"version": "0.32.0"}


@pytest.mark.parametrize("framing", ["0", "1"])
def test_head_tells_the_length_and_sends_no_body(proxy: Twistd, sim: Twistd, framing: str) -> None:
    line = f"X-Vllmsim: bytes; length=5000; chunked={framing}"
    direct = ask(sim, "/v1/x", line, method="HEAD")
    with wire(proxy) as connection:
        connection.send(request("/vllm/v1/x", line, method="HEAD"))
        compare(connection.answer("HEAD"), direct, chunked=framing == "1")
        connection.send(request("/vllm/version"))
        assert connection.answer().json() == {"version": "0.32.0"}


def test_head_of_an_error_has_no_body_either(proxy: Twistd) -> None:
    with wire(proxy) as connection:
        connection.send(request("/vllm/v1/models", method="HEAD", key=None))
        refused = connection.answer("HEAD")
        assert refused.status == 401
        assert int(refused.get("content-length") or 0) > 0
        connection.send(request("/vllm/version"))
        assert connection.answer().json() == {"version": "0.32.0"}


def test_an_empty_body_is_an_empty_body(proxy: Twistd, sim: Twistd) -> None:
    both(proxy, sim, "/v1/x", "X-Vllmsim: bytes; length=0")
    assert ask(proxy, "/vllm/v1/x", "X-Vllmsim: bytes; length=0; chunked=1").chunks == ()


# old and odd framings of vLLM's answer


@pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing"])
def test_an_http10_answer_passes(proxy: Twistd, sim: Twistd, path: str) -> None:
    direct = ask(sim, path, ID, "X-Vllmsim: http10")
    assert (direct.version, direct.get("content-length")) == (b"HTTP/1.0", None)
    with wire(proxy) as connection:
        for _ in range(2):  # the close is the upstream's alone
            connection.send(request("/vllm" + path, ID, "X-Vllmsim: http10"))
            answer = connection.answer()
            assert answer.version == b"HTTP/1.1"
            assert (answer.status, answer.reason) == (direct.status, direct.reason)
            assert len(answer.body) == len(direct.body)
            assert answer.get("connection") is None


def test_a_close_delimited_answer_passes(proxy: Twistd) -> None:
    with wire(proxy) as connection:
        for length in (0, 1, 2_000_000):
            connection.send(request("/vllm/v1/x", f"X-Vllmsim: bytes; length={length}; chunked=close"))
            assert len(connection.answer().body) == length


def test_an_answer_before_the_end_of_the_request(proxy: Twistd) -> None:
    head = request("/vllm/v1/x", "X-Vllmsim: bytes; length=70000; early=1", "Content-Length: 1000000", method="POST")
    with wire(proxy) as connection:
        connection.send(head + b"a" * 1000)
        assert len(connection.answer().body) == 70_000


# informational


@pytest.mark.parametrize("code", [102, 103, 199])
def test_an_informational_answer_passes(proxy: Twistd, sim: Twistd, code: int) -> None:
    line = f"X-Vllmsim: continue; code={code}"
    direct, ours = ask(sim, "/v1/nothing", line), ask(proxy, "/vllm/v1/nothing", line)
    compare(ours, direct)
    (interim,), (theirs,) = ours.interim, direct.interim
    assert (interim.status, interim.reason) == (theirs.status, theirs.reason)
    assert interim.get("link") == theirs.get("link")
    assert interim.get("content-length") is None


def test_an_informational_answer_leaves_at_once(proxy: Twistd) -> None:
    with wire(proxy) as connection:
        body = b'{"model":"qwen2.5-7b-instruct","prompt":"a","max_tokens":1}'
        line = "X-Vllmsim: continue; code=103; ttft=3600"
        connection.send(request("/vllm/v1/completions", line, JSON, method="POST", body=body))
        assert connection.head().status == 103


def test_a_100_that_nobody_asked_for_does_no_harm(proxy: Twistd) -> None:
    answer = ask(proxy, "/vllm/v1/nothing", "X-Vllmsim: continue; code=100", method="POST", body=b"x" * 100_000)
    assert answer.status == 404


def test_http10_clients_get_no_informational_answer(proxy: Twistd) -> None:
    with wire(proxy) as connection:
        connection.send(request("/vllm/v1/nothing", "X-Vllmsim: continue; code=103", version="1.0"))
        answer = connection.answer()
        assert (answer.status, answer.interim) == (404, ())
