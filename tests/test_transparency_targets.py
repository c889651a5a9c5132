"""Every method and every target reach vLLM as they were sent, and a ``Location`` of vLLM's leads back to it."""

from collections.abc import Iterator

import pytest
from _service import Twistd, start_proxy
from _wire import Answer, ask, compare, echo, request, wire


@pytest.fixture(scope="module")
def v1(sim: Twistd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    """A proxy whose upstream URL ends in ``/v1``."""
    service = start_proxy(tmp_path_factory.mktemp("v1"), f"{sim.url}/v1")
    yield service
    service.stop()


@pytest.fixture(scope="module")
def slashed(sim: Twistd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    """A proxy whose upstream URL has a path of two segments and a slash at its end."""
    service = start_proxy(tmp_path_factory.mktemp("slashed"), f"{sim.url}/gpu%201/api/")
    yield service
    service.stop()


@pytest.mark.parametrize("method", ["GET", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"])
def test_the_method_is_kept(proxy: Twistd, method: str) -> None:
    echoed = echo(proxy, "/vllm/v1/anything", method=method)
    assert (echoed["method"], echoed["target"]) == (method, "/v1/anything")


def test_head_is_kept(proxy: Twistd, sim: Twistd) -> None:
    ours = ask(proxy, "/vllm/v1/anything", "X-Vllmsim: bytes; length=1234", method="HEAD")
    assert (ours.status, ours.get("content-length"), ours.body) == (200, b"1234", b"")
    # The simulated vLLM has no HEAD on this route: its own refusal shows which method it saw.
    direct = ask(sim, "/v1/models", method="HEAD")
    assert ask(proxy, "/vllm/v1/models", method="HEAD").status == direct.status == 405


SAME = [
    "/",
    "/?",
    "/?a=1",
    "/v1/models",
    "/v1/models/",
    "/v1/models?",
    "/v1/models/?",
    "/v1/models??",
    "/v1/models?a=1&a=2&a=1",
    "/v1/models?a&b=&=c&&",
    "/v1/models?b=2&a=1;c=3",
    "/v1/models?q=%20+%2B%26%3D%23%25",
    "/v1/models?q=%C3%A9&%c3%a9=1",
    "/v1/models?url=http://other/../a//b/./c;d%2fe%5c%00",
    "/v1/models?q=%zz%",
    '/v1/models?q="<>[]{}|\\^`',
    "/v1/models?/v1/sleep",
    "/v1/files/a%20b/%C3%A9",
    "/v1/files/a%20b/%c3%a9/",
    "/v1/files/%7Euser/%41",
    "/v1/files/~!$&'()*+,=:@-._x",
    "/v1/files/%25%3F%3A%26",
    "/v1/files/...",
    "/v1/files/.hidden/..hidden/trail.",
    "/v1/files/a..b/",
    "/v1/:action",
    "/v1/" + "x" * 2000 + "?" + "y=" + "z" * 8000,
    "/tokenize",
    "/metrics",
    "/v1/chat/completions",
    "/vllm/v1/models",
    "/chatter/completions",
    "/modelsx",
    "/v1x",
]


@pytest.mark.parametrize("target", SAME, ids=lambda target: target[:40])
def test_the_raw_target_is_kept(proxy: Twistd, target: str) -> None:
    assert echo(proxy, "/vllm" + target)["target"] == target


@pytest.mark.parametrize(("sent", "expected"), [("/vllm", "/"), ("/vllm?", "/?"), ("/vllm?a=1&a=2", "/?a=1&a=2")])
def test_the_prefix_alone_is_the_root(proxy: Twistd, sent: str, expected: str) -> None:
    assert echo(proxy, sent)["target"] == expected


def test_the_absolute_form_is_a_target_too(proxy: Twistd) -> None:
    # RFC 9112 section 3.2.2: a server must accept it.
    echoed = echo(proxy, "http://proxy.example/vllm/v1/models?a=%20")
    assert echoed["target"] == "/v1/models?a=%20"


@pytest.mark.parametrize(
    "bare",
    [
        "/chat/completions",
        "/completions",
        "/responses",
        "/messages",
        "/messages/count_tokens",
        "/embeddings",
        "/models",
        "/models/some%2Dmodel",
        "/audio/transcriptions",
        "/audio/translations",
    ],
)
@pytest.mark.parametrize("query", ["", "?", "?a=1&a=%20", "?/x"])
def test_bare_paths_reach_v1(proxy: Twistd, bare: str, query: str) -> None:
    assert echo(proxy, f"/vllm{bare}{query}")["target"] == f"/v1{bare}{query}"


@pytest.mark.parametrize(
    "rest",
    ["/chat/completions", "/models?a=1", "/models/", "/messages", "/rerank", "/a%20b/%C3%A9?", "/v1/chat/completions"],
)
def test_an_upstream_with_a_path_is_joined_and_nothing_is_mapped(v1: Twistd, slashed: Twistd, rest: str) -> None:
    assert echo(v1, "/vllm" + rest)["target"] == "/v1" + rest
    assert echo(slashed, "/vllm" + rest)["target"] == "/gpu%201/api" + rest


def test_an_openai_call_by_way_of_a_base_path(v1: Twistd) -> None:
    body = b'{"model":"qwen2.5-7b-instruct","messages":[{"role":"user","content":"hello"}],"max_tokens":3}'
    answer = ask(v1, "/vllm/chat/completions", "Content-Type: application/json", method="POST", body=body)
    assert answer.status == 200
    assert answer.json()["object"] == "chat.completion"


# Location


def at_proxy(location: bytes | None, host: str = "proxy.example") -> str:
    """Return a Location as the client of ``host`` will ask for it, or as it is if it leads elsewhere."""
    assert location is not None
    text = location.decode()
    for scheme in ("http://", "https://"):
        if text.startswith(f"{scheme}{host}/"):
            return text[len(scheme) + len(host) :]
    return text


def redirected(service: Twistd, location: str) -> str:
    answer = ask(service, "/vllm/v1/models", f"X-Vllmsim: status; code=307; location={location}")
    assert (answer.status, answer.reason) == (307, b"Temporary Redirect")
    return at_proxy(answer.get("location"))


def test_a_location_that_names_the_upstream_lies_under_vllm(proxy: Twistd, sim: Twistd) -> None:
    authority = f"127.0.0.1:{sim.port}"
    assert redirected(proxy, f"http://{authority}/v1/x?a=%20&a#f") == "/vllm/v1/x?a=%20&a#f"
    assert redirected(proxy, f"https://{authority}/v1/x/") == "/vllm/v1/x/"
    assert redirected(proxy, f"HTTP://{authority}/v1/x") == "/vllm/v1/x"
    assert redirected(proxy, f"//{authority}/v1/x") == "/vllm/v1/x"
    assert redirected(proxy, f"http://{authority}").rstrip("/") == "/vllm"
    assert redirected(proxy, "/v1/x?y") == "/vllm/v1/x?y"


def test_a_location_elsewhere_is_left_alone(proxy: Twistd, sim: Twistd) -> None:
    for location in (
        "http://other.example/v1/x?a",
        "https://other.example:8443",
        f"http://127.0.0.1:{sim.port}9/v1/x",
        f"http://127.0.0.1:{sim.port}.evil.example/",
        f"http://127.0.0.1:{sim.port}@evil.example/",
        f"http://other.example/?next=http://127.0.0.1:{sim.port}/",
        "//other.example/v1/x",
        "relative/path?x",
        "?x=1",
    ):
        assert redirected(proxy, location) == location


def test_a_location_loses_the_upstreams_base_path(v1: Twistd, sim: Twistd) -> None:
    authority = f"127.0.0.1:{sim.port}"
    assert redirected(v1, f"http://{authority}/v1/chat/x?a") == "/vllm/chat/x?a"
    assert redirected(v1, "/v1/chat") == "/vllm/chat"
    assert redirected(v1, f"http://{authority}/v1").rstrip("/") == "/vllm"


def test_vllms_own_slash_redirect_can_be_followed(proxy: Twistd) -> None:
    with wire(proxy) as connection:
        connection.send(request("/vllm/v1/models/?a=1", host=f"127.0.0.1:{proxy.port}"))
        first = connection.answer()
        assert first.status == 307
        target = at_proxy(first.get("location"), f"127.0.0.1:{proxy.port}")
        connection.send(request(target))
        assert connection.answer().status == 200


# CORS


def preflight(service: Twistd, target: str, *lines: str) -> Answer:
    wanted = ("Origin: https://page.example", "Access-Control-Request-Method: POST")
    return ask(service, target, *wanted, *lines, method="OPTIONS", key=None)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/metrics", "/v1/messages"])
def test_a_preflight_passes_without_a_key(proxy: Twistd, sim: Twistd, path: str) -> None:
    line = "Access-Control-Request-Headers: authorization,content-type"
    direct, ours = preflight(sim, path, line), preflight(proxy, "/vllm" + path, line)
    compare(ours, direct)
    assert ours.get("access-control-allow-headers") == b"authorization,content-type"
