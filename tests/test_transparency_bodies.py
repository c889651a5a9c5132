"""Bodies pass byte for byte, both ways, however they are written and framed."""

import gzip
import hashlib
from typing import Any

import pytest
from _service import Twistd
from _wire import Answer, ask, compare, echo, request, values, wire

JSON = "Content-Type: application/json"

BODIES = {
    "duplicate members": b'{"model": "m", "model" : "n", "temperature": 1e2, "top_p":1.0, "n": 1.50E+1}',
    "white space": b' \r\n\t{ "a" :\t1 ,\n"b":[ ] }\n\n',
    "escapes": b'{"a":"\\u00e9\\/\\ud83d\\ude00\\u0000","b":"\xc3\xa9"}',
    "a byte order mark": b'\xef\xbb\xbf{"a":1}',
    "a lone surrogate": b'{"a":"\\ud83d"}',
    "invalid UTF-8": b'{"a":"\xff\xfe\xc3"}',
    "invalid JSON": b'{"model":"m","messages":[{"role":"user"}],}',
    "not JSON at all": b"\x00\x01\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    "one byte": b"\n",
    "every byte": bytes(range(256)) * 400,
}


def same(echoed: Any, body: bytes) -> None:
    """Check that the simulator received exactly ``body``."""
    assert echoed["body_length"] == len(body)
    assert echoed["body_sha256"] == hashlib.sha256(body).hexdigest()


def chunks(body: bytes, size: int) -> bytes:
    """Return ``body`` in the chunked coding, in chunks of ``size``."""
    parts = [body[offset : offset + size] for offset in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def send_chunked(service: Twistd, encoded: bytes, *lines: str) -> Any:
    """POST an encoded body and return what arrived."""
    head = request("/vllm/v1/x", "Transfer-Encoding: chunked", "X-Vllmsim: echo", *lines, method="POST")
    with wire(service) as connection:
        connection.send(head + encoded)
        answer = connection.answer()
        assert answer.status == 200, answer
        return answer.json()


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_a_body_is_not_touched(proxy: Twistd, method: str, name: str) -> None:
    body = BODIES[name]
    echoed = echo(proxy, "/vllm/v1/chat/completions", JSON, method=method, body=body)
    same(echoed, body)
    assert values(echoed, "content-length") == [str(len(body))]
    assert values(echoed, "transfer-encoding") == []


@pytest.mark.parametrize("name", BODIES)
def test_vllm_answers_for_the_body(proxy: Twistd, sim: Twistd, name: str) -> None:
    def post(service: Twistd, path: str) -> Answer:
        return ask(service, path, JSON, method="POST", body=BODIES[name])

    direct = post(sim, "/v1/chat/completions")
    assert direct.status == 400
    compare(post(proxy, "/vllm/v1/chat/completions"), direct)


def test_the_seeds_trailing_comma_gets_vllms_own_400(proxy: Twistd) -> None:
    body = b'{"model": "qwen2.5-7b-instruct", "messages": [{"role": "user", "content": "hi"}],}'
    answer = ask(proxy, "/vllm/chat/completions", JSON, method="POST", body=body)
    assert answer.status == 400
    assert answer.json()["error"]["code"] == 400  # a number: vLLM's own shape


def test_a_missing_content_type_is_vllms_to_refuse(proxy: Twistd, sim: Twistd) -> None:
    body = b'{"model":"qwen2.5-7b-instruct","prompt":"a"}'
    direct = ask(sim, "/v1/completions", method="POST", body=body)
    assert direct.status == 400
    compare(ask(proxy, "/vllm/v1/completions", method="POST", body=body), direct)
    assert values(echo(proxy, "/vllm/v1/completions", method="POST", body=body), "content-type") == []


def test_multipart_keeps_its_own_boundary(proxy: Twistd) -> None:
    boundary = "odd '()+_,-./:=? one"
    kind = f'Content-Type: multipart/form-data; boundary="{boundary}"; charset=x'
    parts = b'--%s\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n%s\r\n--%s--\r\n'
    body = parts % (boundary.encode(), bytes(range(256)) * 1000, boundary.encode())
    echoed = echo(proxy, "/vllm/audio/transcriptions", kind, method="POST", body=body)
    same(echoed, body)
    assert values(echoed, "content-type") == [kind.partition(": ")[2]]
    answer = ask(proxy, "/vllm/audio/transcriptions", kind, method="POST", body=body)
    assert (answer.status, answer.json()["usage"]["type"]) == (200, "duration")


@pytest.mark.parametrize("size", [1, 7, 4096, 1_000_000])
def test_a_chunked_upload_stays_one(proxy: Twistd, size: int) -> None:
    body = bytes(range(251)) * (20 if size == 1 else 5000)
    echoed = send_chunked(proxy, chunks(body, size))
    same(echoed, body)
    assert values(echoed, "transfer-encoding") == ["chunked"]
    assert values(echoed, "content-length") == []


def test_an_empty_chunked_upload_stays_one(proxy: Twistd) -> None:
    echoed = send_chunked(proxy, b"0\r\n\r\n")
    same(echoed, b"")
    assert values(echoed, "transfer-encoding") == ["chunked"]
    assert values(echoed, "content-length") == []


def test_chunk_extensions_and_trailers_do_no_harm(proxy: Twistd) -> None:
    encoded = b"5;a=b\r\nhello\r\n0\r\nX-Sum: 1\r\nX-Data-Parallel-Rank: 3\r\n\r\n"
    echoed = send_chunked(proxy, encoded, "Trailer: X-Sum")
    same(echoed, b"hello")
    assert values(echoed, "x-data-parallel-rank") == []
    assert values(echoed, "trailer") == []


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_no_body_is_no_body(proxy: Twistd, method: str) -> None:
    echoed = echo(proxy, "/vllm/v1/x", method=method)
    same(echoed, b"")
    assert values(echoed, "content-length") == []
    assert values(echoed, "transfer-encoding") == []


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_a_length_of_zero_is_kept(proxy: Twistd, method: str) -> None:
    echoed = echo(proxy, "/vllm/v1/x", method=method, body=b"")
    same(echoed, b"")
    assert values(echoed, "content-length") == ["0"]
    assert values(echoed, "transfer-encoding") == []


def test_a_body_of_a_get_passes(proxy: Twistd) -> None:
    same(echo(proxy, "/vllm/v1/x", body=b"unusual, and legal"), b"unusual, and legal")


def test_a_body_that_comes_byte_by_byte(proxy: Twistd) -> None:
    data = request("/vllm/v1/x", "X-Vllmsim: echo", method="POST", body=b"slowly but surely")
    with wire(proxy) as connection:
        for offset in range(len(data)):
            connection.send(data[offset : offset + 1])
        same(connection.answer().json(), b"slowly but surely")


def test_32_mib_pass_up(proxy: Twistd) -> None:
    body = bytes(range(256)) * (32 << 12)
    same(echo(proxy, "/vllm/v1/x", method="POST", body=body), body)
    same(send_chunked(proxy, chunks(body, 300_000)), body)


# gzip


def test_a_gzipped_request_stays_gzipped(proxy: Twistd) -> None:
    body = gzip.compress(b'{"a":1}' * 100)
    echoed = echo(proxy, "/vllm/v1/x", JSON, "Content-Encoding: gzip", method="POST", body=body)
    same(echoed, body)
    assert values(echoed, "content-encoding") == ["gzip"]


@pytest.mark.parametrize("accept", [("Accept-Encoding: gzip",), ("Accept-Encoding: br;q=1.0, identity;q=0",), ()])
def test_a_gzipped_answer_stays_gzipped(proxy: Twistd, sim: Twistd, accept: tuple[str, ...]) -> None:
    direct = ask(sim, "/v1/models", "X-Vllmsim: gzip", "X-Request-Id: same", *accept)
    ours = ask(proxy, "/vllm/v1/models", "X-Vllmsim: gzip", "X-Request-Id: same", *accept)
    assert direct.get("content-encoding") == b"gzip"
    assert ours.body[:2] == b"\x1f\x8b"
    assert len(gzip.decompress(ours.body)) == len(gzip.decompress(direct.body))
    assert ours.get("content-encoding") == b"gzip"
    assert ours.get("content-length") == b"%d" % len(ours.body)


@pytest.mark.parametrize("accept", ["gzip", "identity", "br;q=1.0, *;q=0", ""])
def test_accept_encoding_is_passed_as_sent(proxy: Twistd, accept: str) -> None:
    assert values(echo(proxy, "/vllm/v1/x", f"Accept-Encoding: {accept}"), "accept-encoding") == [accept]


def test_accept_encoding_is_not_added(proxy: Twistd) -> None:
    assert values(echo(proxy, "/vllm/v1/x"), "accept-encoding") == []


# answers


@pytest.mark.parametrize("framing", ["0", "1", "close"])
@pytest.mark.parametrize("length", [0, 1, 65_536, 3_000_000])
def test_an_answers_bytes_are_vllms(proxy: Twistd, sim: Twistd, length: int, framing: str) -> None:
    line = f"X-Vllmsim: bytes; length={length}; chunked={framing}; chunk=50000"
    direct = ask(sim, "/v1/x", line)
    assert len(direct.body) == length
    compare(ask(proxy, "/vllm/v1/x", line), direct, chunked=framing != "0")


def test_octet_streams_and_errors_pass_alike(proxy: Twistd, sim: Twistd) -> None:
    for line in (
        "bytes; length=700; status=500",
        "status; code=422",
        "status; code=503",
        "bytes; length=9; status=404",
    ):
        compare(ask(proxy, "/vllm/v1/x", f"X-Vllmsim: {line}"), ask(sim, "/v1/x", f"X-Vllmsim: {line}"))
