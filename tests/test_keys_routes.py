import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.keys.routes import KNOWN_ROUTES, Group, group_for, group_of, is_anthropic

ADMIN = [
    b"/scale_elastic_ep",
    b"/is_scaling_elastic_ep",
    b"/v1/load_lora_adapter",
    b"/v1/unload_lora_adapter",
    b"/adapters",
    b"/adapters/x/y",
    b"/start_profile",
    b"/stop_profile",
    b"/abort_requests",
    b"/inference/v1/abort_requests",
    b"/fault_tolerance/apply",
    b"/server_info",
    b"/reset_prefix_cache",
    b"/reset_mm_cache",
    b"/collective_rpc",
    b"/sleep",
    b"/wake_up",
    b"/is_sleeping",
    b"/pause",
    b"/resume",
    b"/release_kv_cache_memory",
    b"/update_weights",
    b"/init_weight_transfer_engine",
]
INFO = [
    b"/health",
    b"/ping",
    b"/version",
    b"/load",
    b"/metrics",
    b"/v1/models",
    b"/v1/models/some-weights",
    b"/kv_event_sources",
    b"/tokenizer_info",
    b"/openapi.json",
    b"/docs",
    b"/docs/oauth2-redirect",
    b"/redoc",
    b"/static/swagger.css",
]
INFERENCE = [
    b"/invocations",
    b"/pooling",
    b"/classify",
    b"/score",
    b"/rerank",
    b"/tokenize",
    b"/detokenize",
    b"/generative_scoring",
    b"/v1/chat/completions",
    b"/v1/responses/resp_1/cancel",
    b"/v1/realtime",
    b"/v1/something-new",
    b"/v2/rerank",
    b"/inference/v1/generate",
    b"/cohere/v2/embed",
    b"/v1/caf%C3%A9%20x",
]
UNKNOWN = [
    b"",
    b"/",
    b"/v1",
    b"/v1/",
    b"v1/chat/completions",
    b"*",
    b"/unheard-of",
    b"/V1/chat/completions",
    b"/Health",
    b"/health/x",
    b"/metricsx",
    b"/chat/completions",
    b"/v1x/chat",
    # Unsafe or ambiguous: never open.
    b"/v1/a%2fb",
    b"/v1/a%2Fb",
    b"/v1/a%5cb",
    b"/v1/a\\b",
    b"/v1/a%00",
    b"/v1//a",
    b"//v1/a",
    b"/v1/a;b",
    b"/v1/a%3Bb",
    b"/v1/./a",
    b"/v1/../sleep",
    b"/v1/%2e%2e/sleep",
    b"/v1/..",
    b"/v1/.%2E",
    b"/v1/a%3Fb",
    b"/v1/a%23b",
    b"/v1/%",
    b"/v1/%zz",
    b"/v1/%ff",
    b"/v1/\xc3\xa9",
    b"/%2573leep",
    b"/v1/%25",
    b"/v1/a%0a",
    b"/v1/a%09",
]


@pytest.mark.parametrize(
    ("path", "group"),
    [
        *((path, "admin") for path in ADMIN),
        *((path, "info") for path in INFO),
        *((path, "inference") for path in INFERENCE),
        *((path, "unknown") for path in UNKNOWN),
    ],
)
def test_group_of(path: bytes, group: Group) -> None:
    assert group_of(path) == group
    assert group_for(path, b"") == group
    if group != "unknown":
        assert group_of(path + b"/") == group


@pytest.mark.parametrize("blank", [b"%20", b"%09", b"%0d%0a", b"%0B", b"%0c", b"%c2%a0", b"%e2%80%83", b"%20%20"])
def test_blanks_make_nothing_else_of_an_admin_route(blank: bytes) -> None:
    for path in ADMIN:
        first, *rest = path[1:].split(b"/")
        for spelt in (path + blank, path + blank + b"/", b"/%s%s" % (blank, path[1:]), b"/" + blank + path):
            assert group_of(spelt) == "admin"
        assert group_of(b"/" + b"/".join([first + blank, *rest])) == "admin"
    assert group_of(b"/v1/models/a" + blank) in ("info", "unknown")
    assert group_of(b"/v1/chat/completions" + blank) in ("inference", "unknown")


@given(st.sampled_from(ADMIN), st.data())
def test_an_admin_route_stays_one_however_it_is_spelt(path: bytes, data: st.DataObject) -> None:
    """uvicorn decodes ``/%73leep`` to ``/sleep``: encoded or not, in any case, slash or not."""
    letters = string.ascii_letters.encode() + b"_0123456789"
    spelt = b"".join(
        data.draw(st.sampled_from([bytes([c]), b"%%%02x" % c, b"%%%02X" % c, bytes([c]).upper()]))
        if c in letters
        else bytes([c])
        for c in path
    )
    assert group_of(spelt + data.draw(st.sampled_from([b"", b"/"]))) == "admin"


@given(st.sampled_from(ADMIN), st.sampled_from([b"/gpu1", b"/a/b", b"/v1", b"/inference"]))
def test_an_admin_route_stays_one_behind_a_base(path: bytes, base: bytes) -> None:
    assert group_for(base + path, base) == "admin"
    assert group_for(base + path, base + b"/") == "admin"


@given(st.binary(max_size=40), st.sampled_from([b"", b"/gpu1", b"/v1"]))
def test_any_bytes_have_a_group_and_unsafe_ones_are_shut(tail: bytes, base: bytes) -> None:
    assert group_for(base + b"/" + tail, base) in ("inference", "info", "admin", "unknown")
    assert group_for(base + b"/v1/../" + tail, base) == "unknown"


@pytest.mark.parametrize(
    ("path", "base", "group"),
    [
        (b"/gpu1/v1/chat/completions", b"/gpu1", "inference"),
        (b"/gpu1/metrics", b"/gpu1", "info"),
        (b"/gpu1/unheard-of", b"/gpu1", "unknown"),
        (b"/v1/chat/completions", b"/v1", "inference"),
        (b"/v1/models", b"/v1", "info"),
        (b"/v1/load_lora_adapter", b"/v1", "admin"),
        (b"/v1/sleep", b"/v1", "admin"),
        (b"/gpu1", b"/gpu1", "unknown"),
        # Not below the base after all: judged as it is.
        (b"/gpu10/v1/chat/completions", b"/gpu1", "unknown"),
        (b"/v1/chat/completions", b"/gpu1", "inference"),
        (b"/sleep", b"/gpu1", "admin"),
        # A base that is itself an admin word is judged as one, on the safe side.
        (b"/sleep/v1/models", b"/sleep", "admin"),
    ],
)
def test_group_for(path: bytes, base: bytes, group: Group) -> None:
    assert group_for(path, base) == group


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"/v1/messages", True),
        (b"/v1/messages/", True),
        (b"/v1/%6dessages", True),
        (b"/v1/messages/count_tokens", True),
        (b"/v1/messagesx", False),
        (b"/v1/chat/completions", False),
        (b"/v1/messages/..", False),
    ],
)
def test_is_anthropic(path: bytes, expected: bool) -> None:
    assert is_anthropic(path) is expected


def test_known_routes_all_have_a_group() -> None:
    assert {path for path in KNOWN_ROUTES if group_of(path) == "unknown"} == set()
    assert b"/v1/chat/completions" in KNOWN_ROUTES
