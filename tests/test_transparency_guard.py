"""What must not reach vLLM does not: unsafe paths, admin routes for virtual keys, paths that nobody knows."""

import re
from collections.abc import Iterator

import pytest
from _service import Twistd, start_proxy, start_simulator
from _spellings import ADMIN, UNSAFE, spellings
from _wire import Answer, ask, echo, new_key, requests_seen, seen


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    """A simulated vLLM that nobody but these tests asks."""
    service = start_simulator(tmp_path_factory.mktemp("lonely"))
    yield service
    service.stop()


@pytest.fixture(scope="module", params=["", "/v1", "/gpu1", "/a/v1"], ids=lambda base: f"base={base or 'none'}")
def door(request: pytest.FixtureRequest, lonely: Twistd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twistd]:
    """A proxy in front of it, its upstream URL without a path and with several."""
    service = start_proxy(tmp_path_factory.mktemp("door"), lonely.url + request.param)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def virtual(door: Twistd) -> str:
    """A virtual key of that proxy."""
    return new_key(door)


# unsafe paths


@pytest.mark.parametrize("path", UNSAFE)
def test_an_unsafe_path_is_a_400_that_vllm_never_sees(door: Twistd, lonely: Twistd, virtual: str, path: str) -> None:
    before = requests_seen(lonely)
    for method in ("GET", "POST", "OPTIONS"):
        for key in (None, virtual, "master"):
            keyed = {} if key == "master" else {"key": key}
            answer = ask(door, "/vllm" + path, method=method, **keyed)
            assert answer.status == 400, (method, key, answer)
            assert answer.get("connection") == b"close"
            error = answer.json()["error"]
            assert (error["code"], set(error)) == ("400", {"message", "type", "param", "code"})
    assert requests_seen(lonely) == before


def test_what_is_unsafe_in_a_path_is_harmless_in_a_query(door: Twistd, virtual: str) -> None:
    query = "?a=%2f%5c%00//;../%2e%2e/./.."
    assert echo(door, "/vllm/v1/models" + query, key=virtual)["target"].endswith("/v1/models" + query)


# admin routes


@pytest.mark.parametrize("path", ADMIN)
def test_there_are_enough_spellings(path: str) -> None:
    assert len(spellings(path)) >= 150


@pytest.mark.parametrize("path", ADMIN)
def test_no_spelling_of_an_admin_route_is_open_to_a_virtual_key(
    door: Twistd, lonely: Twistd, virtual: str, path: str
) -> None:
    before = requests_seen(lonely)
    refused, passed = 0, []
    for spelling in spellings(path):
        answer = ask(door, "/vllm" + spelling, method="POST", key=virtual)
        if answer.status == 403:
            refused += 1
            assert "master key" in answer.json()["error"]["message"]
        elif answer.status != 400:
            passed.append((spelling, answer.status))
    assert passed == []
    assert refused >= 60
    assert requests_seen(lonely) == before


@pytest.mark.parametrize("path", ADMIN)
@pytest.mark.parametrize("tail", [".", "%20", "%C2%A0", "x", "%E2%80%8B", "-"])
def test_what_only_looks_like_an_admin_route_is_none(
    door: Twistd, lonely: Twistd, virtual: str, path: str, tail: str
) -> None:
    before = seen(lonely)["admin"]
    answer = ask(door, "/vllm" + path + tail, method="POST", key=virtual)
    assert answer.status == 403 or answer.json() == {"detail": "Not Found"}  # vLLM's own
    assert seen(lonely)["admin"] == before


@pytest.mark.parametrize("path", ADMIN)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_no_method_opens_an_admin_route(door: Twistd, lonely: Twistd, virtual: str, path: str, method: str) -> None:
    before = requests_seen(lonely)
    override = ("X-HTTP-Method-Override: GET", f"X-Original-URL: {path}", f"X-Rewrite-URL: {path}")
    for lines in ((), override, ("Origin: https://x.example", "Access-Control-Request-Method: GET")):
        answer = ask(door, "/vllm" + path, *lines, method=method, key=virtual)
        assert answer.status == 403, lines
    answer = ask(door, f"http://proxy.example/vllm{path}", method=method, key=virtual)
    assert answer.status == 403
    assert ask(door, "/vllm" + path, method=method, key=virtual, version="1.0").status == 403
    assert requests_seen(lonely) == before


@pytest.mark.parametrize("path", ADMIN)
def test_nobody_without_a_key_reaches_an_admin_route(door: Twistd, lonely: Twistd, path: str) -> None:
    before = requests_seen(lonely)
    for method in ("GET", "POST", "OPTIONS"):
        for key in (None, "sk-nobody-has-this-one-0123"):
            assert ask(door, "/vllm" + path, method=method, key=key).status == 401
    lines = ("Origin: https://x.example", "Access-Control-Request-Method: POST")
    assert ask(door, "/vllm" + path, *lines, method="OPTIONS", key=None).status in (401, 403)
    assert requests_seen(lonely) == before


@pytest.mark.parametrize(
    "path",
    [
        "/scale_elastic_ep",
        "/v1/unload_lora_adapter",
        "/adapters",
        "/adapters/one",
        "/start_profile",
        "/stop_profile",
        "/abort_requests",
        "/inference/v1/abort_requests",
        "/fault_tolerance/apply",
        "/server_info",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/collective_rpc",
        "/wake_up",
        "/is_sleeping",
        "/pause",
        "/resume",
        "/release_kv_cache_memory",
        "/update_weights",
        "/init_weight_transfer_engine",
        "/get_weight_version",
    ],
)
def test_every_other_admin_route_is_for_the_master_key(door: Twistd, lonely: Twistd, virtual: str, path: str) -> None:
    before = requests_seen(lonely)
    answer = ask(door, "/vllm" + path, method="POST", key=virtual)
    assert answer.status == 403
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("auth_error", "403")
    assert "master key" in error["message"]
    assert requests_seen(lonely) == before
    ask(door, "/vllm" + path, method="POST")
    assert requests_seen(lonely) == before + 1


def test_the_master_key_reaches_admin_routes(proxy: Twistd, sim: Twistd) -> None:
    for path in (*ADMIN, "/%73leep", "/collective_rpc", "/v1/unload_lora_adapter"):
        before = sum(seen(sim)["admin"].values())
        assert ask(proxy, "/vllm" + path, method="POST").status == 200
        assert sum(seen(sim)["admin"].values()) == before + 1


def test_a_base_path_can_lead_to_an_admin_route(lonely: Twistd, door: Twistd, virtual: str) -> None:
    """``/vllm/load_lora_adapter`` at an upstream of ``…/v1`` is ``/v1/load_lora_adapter``."""
    before = seen(lonely)["admin"]
    assert ask(door, "/vllm/load_lora_adapter", method="POST", key=virtual).status == 403
    assert ask(door, "/vllm/%6coad_lora_adapter", method="POST", key=virtual).status == 403
    assert seen(lonely)["admin"] == before


# paths that nobody knows


@pytest.mark.parametrize("path", ["/", "", "/nothing", "/v3/models", "/v1x", "/admin", "/debug/x", "/%C3%A9", "/%ff"])
def test_an_unknown_path_is_for_the_master_key_only(proxy: Twistd, sim: Twistd, path: str) -> None:
    before, key = requests_seen(sim), new_key(proxy)
    answer = ask(proxy, "/vllm" + path, key=key)
    assert answer.status == 403
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("auth_error", "403")
    assert error["message"].startswith("Virtual key is not allowed to call this route.")
    assert re.search("master key", error["message"])
    assert requests_seen(sim) == before
    assert ask(proxy, "/vllm" + path).status == 404  # vLLM's own
    assert requests_seen(sim) == before + 1


@pytest.mark.parametrize("path", ["/v1/new/thing", "/v2/new", "/inference/new", "/inference/v1/new", "/cohere/v2/new"])
def test_an_unknown_path_below_an_inference_prefix_is_inference(proxy: Twistd, sim: Twistd, path: str) -> None:
    before, key = requests_seen(sim), new_key(proxy)
    assert ask(proxy, "/vllm" + path, key=key).json() == {"detail": "Not Found"}
    assert requests_seen(sim) == before + 1


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/ping",
        "/version",
        "/load",
        "/metrics",
        "/v1/models",
        "/models",
        "/tokenizer_info",
        "/openapi.json",
        "/kv_event_sources",
    ],
)
def test_read_only_routes_are_open_to_a_virtual_key(proxy: Twistd, path: str) -> None:
    assert ask(proxy, "/vllm" + path, key=new_key(proxy)).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/invocations",
        "/pooling",
        "/classify",
        "/score",
        "/rerank",
        "/tokenize",
        "/detokenize",
        "/generative_scoring",
        "/chat/completions",
        "/v1/messages",
        "/v1/responses",
        "/inference/v1/generate",
    ],
)
def test_inference_routes_are_open_to_a_virtual_key(proxy: Twistd, sim: Twistd, path: str) -> None:
    before = requests_seen(sim)
    assert echo(proxy, "/vllm" + path, method="POST", key=new_key(proxy))["method"] == "POST"
    assert requests_seen(sim) == before + 1


@pytest.mark.parametrize("door", ["", "/v1", "/a/v1"], indirect=True)
@pytest.mark.parametrize("path", ["/chat/completions", "/models", "/embeddings", "/responses", "/messages"])
def test_bare_paths_are_open_to_a_virtual_key(door: Twistd, virtual: str, path: str) -> None:
    """Where the upstream URL ends in /v1, whatever is before that, these are the paths that an SDK asks for."""
    assert echo(door, "/vllm" + path, key=virtual)["target"].endswith("/v1" + path)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/metrics", "/health", "/tokenize", "/rerank"])
def test_full_paths_are_open_to_a_virtual_key_behind_any_base_path(door: Twistd, virtual: str, path: str) -> None:
    assert echo(door, "/vllm" + path, key=virtual)["target"].endswith(path)


def test_only_vllm_is_below_vllm(proxy: Twistd, sim: Twistd) -> None:
    before = requests_seen(sim)
    beside = [
        "/vllm%2fv1/models",
        "/vllm%2Fsleep",
        "/vllm\\sleep",
        "/vllm%5csleep",
        "/vllm;/sleep",
        "/vllm%00",
        "/v1/x",
    ]
    beside += ["/vllmx", "/%76llm/v1/models", "/VLLM/v1/models", "//vllm/v1/models", "/x/../vllm/v1/models"]
    for path in beside:
        answer = ask(proxy, path)
        assert answer.status in (400, 404), path
        assert answer.json()["error"]
    assert requests_seen(sim) == before


# the shape of a refusal


@pytest.mark.parametrize("path", ["/v1/messages", "/messages", "/v1/messages/count_tokens", "/messages?beta=true"])
def test_refusals_on_anthropic_routes_are_anthropics(proxy: Twistd, path: str) -> None:
    for key in (None, "sk-nobody-has-this-one-0123"):
        answer = ask(proxy, "/vllm" + path, method="POST", body=b"{}", key=key)
        assert anthropic_error(answer, 401) == "authentication_error"


@pytest.mark.parametrize("path", ["/v1//messages", "/v1/messages;x", "/v1/messages/../messages"])
def test_an_unsafe_path_is_refused_in_either_shape(proxy: Twistd, path: str) -> None:
    answer = ask(proxy, "/vllm" + path, method="POST", body=b"{}")
    assert answer.status == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/messages", "/messages"])
def test_refusals_on_anthropic_routes_behind_a_base_path(door: Twistd, path: str) -> None:
    answer = ask(door, "/vllm" + path, method="POST", body=b"{}", key=None)
    assert anthropic_error(answer, 401) == "authentication_error"


def anthropic_error(answer: Answer, status: int) -> str:
    """Return the type in an error of Anthropic's shape, after a look at all of it."""
    assert answer.status == status
    assert answer.get("content-type") == b"application/json"
    content = answer.json()
    assert set(content) == {"type", "error"}
    assert content["type"] == "error"
    assert set(content["error"]) >= {"type", "message"}
    assert content["error"]["message"]
    return str(content["error"]["type"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions", "/sleep", "/nothing", "/messagesx"])
def test_refusals_elsewhere_are_litellms(proxy: Twistd, path: str) -> None:
    answer = ask(proxy, "/vllm" + path, method="POST", body=b"{}", key=None)
    assert answer.status == 401
    assert answer.get("content-type") == b"application/json"
    assert answer.json()["error"] == {
        "message": answer.json()["error"]["message"],
        "type": "auth_error",
        "param": "None",
        "code": "401",
    }
    assert answer.json()["error"]["message"].startswith("Authentication Error, No api key passed in.")
