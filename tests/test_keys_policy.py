"""What key types and allowed routes open, and above all what they do not."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.keys.key import VirtualKey
from vllmproxy.keys.policy import KEY_TYPES, READ_ROUTES, Policy, compile_policy, parse_route
from vllmproxy.keys.routes import group_for

CHAT = b"/v1/chat/completions"


def opens(policy: Policy, path: bytes, base: bytes = b"") -> bool:
    return policy.opens(group_for(base + path, base), base + path, base)


def routes(*entries: str, key_type: str = "default", master: bool = True) -> Policy:
    return compile_policy(key_type, entries, granted_by_master=master)


@pytest.mark.parametrize(
    ("key_type", "opened", "reads", "manages"),
    [
        ("default", {"inference", "info"}, True, False),
        ("llm_api", {"inference", "info"}, False, False),
        ("read_only", {"info"}, True, False),
        ("management", set(), True, True),
    ],
)
def test_key_types(key_type: str, opened: set[str], reads: bool, manages: bool) -> None:
    policy = routes(key_type=key_type)
    paths = {"inference": CHAT, "info": b"/v1/models", "admin": b"/sleep", "unknown": b"/unheard-of"}
    assert {group for group, path in paths.items() if opens(policy, path)} == opened
    assert {policy.may_read(endpoint) for endpoint in READ_ROUTES} == {reads}
    assert policy.may_manage("/key/generate") is manages
    assert policy.is_elevated is manages
    assert not routes(key_type=key_type, master=False).is_elevated


@pytest.mark.parametrize(
    ("entry", "path", "expected"),
    [
        ("/v1/chat/completions", CHAT, True),
        ("/v1/chat/completions/", CHAT, True),
        ("/v1/chat/completions", CHAT + b"/", True),
        ("/v1/chat/completions", b"/v1/chat/completion%73", True),
        ("/v1/chat/completions", b"/v1/completions", False),
        ("/v1/chat", b"/v1/chat", True),
        ("/v1/chat", CHAT, True),
        ("/v1/chat", b"/v1/chatx", False),
        ("/v1/chat", b"/v1/Chat", False),
        ("/v1/chat", b"/v1/chat%2fcompletions", False),
        ("/v1/chat", b"/v1/chat/../embeddings", False),
        ("/v1/chat", b"/v1/chat//x", False),
        ("/v1/chat", b"/v1/chat%253f", False),
        ("/v1", CHAT, True),
        ("/v1/chat*", b"/v1/chatx", True),
        ("/v1/chat/*", b"/v1/chat", False),
        ("/v1/chat/*", CHAT, True),
        ("/*", CHAT, True),
        ("/*", b"/metrics", True),
        ("/*", b"/sleep", False),
        ("/*", b"/unheard-of", False),
        ("/", CHAT, True),
        ("/", b"/sleep", False),
        ("/v1/*", b"/v1/load_lora_adapter", False),
        ("/v1", b"/v1/sleep", False),
        ("/s*", b"/sleep", False),
        ("/v1/load_lora_adapter", b"/v1/load_lora_adapter", True),
        ("/v1/load_lora_adapter", b"/v1/unload_lora_adapter", False),
        ("/sleep", b"/sleep", True),
        ("/sleep", b"/%73leep", True),
        ("/sleep", b"/wake_up", False),
        ("/fault_tolerance/*", b"/fault_tolerance/apply", True),
        ("/plugin", b"/plugin/x", True),
        ("/plugin", b"/pluginx", False),
        ("/plugin/*", b"/plugin/x", True),
        ("/plug*", b"/plugin", False),
        # LiteLLM's own paths have the prefix that is not forwarded.
        ("/vllm/v1/chat", CHAT, True),
        ("/vllm/v1/chat", b"/v1/embeddings", False),
        ("/vllm/*", CHAT, True),
        ("/vllm", CHAT, True),
        ("/vllm*", b"/sleep", False),
        ("inference", CHAT, True),
        ("inference", b"/v1/models", False),
        ("info", b"/v1/models", True),
        ("info", CHAT, False),
        ("admin", b"/sleep", True),
        ("admin", CHAT, False),
        ("admin", b"/unheard-of", False),
        ("llm_api_routes", CHAT, True),
        ("llm_api_routes", b"/v1/models", True),
        ("info_routes", b"/health", True),
        ("info_routes", CHAT, False),
        ("management_routes", CHAT, False),
    ],
)
def test_allowed_routes(entry: str, path: bytes, expected: bool) -> None:
    assert opens(routes(entry), path) is expected
    for base in (b"/gpu1", b"/gpu1/"):
        assert routes(entry).opens(group_for(b"/gpu1" + path, base), b"/gpu1" + path, base) is expected


def test_an_entry_may_name_the_path_with_the_upstreams_base() -> None:
    policy = routes("/gpu1/v1/chat")
    assert opens(policy, CHAT, b"/gpu1")
    assert not opens(policy, CHAT, b"/gpu2")
    assert not opens(policy, CHAT)


@pytest.mark.parametrize(
    ("entry", "path", "base", "expected"),
    [
        ("/v1/chat/completions", b"/chat/completions", b"/gpu1/v1", True),
        ("/v1/*", b"/chat/completions", b"/gpu1/v1/", True),
        ("/v1/models", b"/models", b"/a/b/v1", True),
        ("/chat/completions", b"/chat/completions", b"/gpu1/v1", True),
        ("/v1/chat/completions", b"/completions", b"/gpu1/v1", False),
        # What is known without all of the base is that, whatever it would be with a part of it.
        ("/v1/*", b"/metrics", b"/gpu1/v1", False),
        ("/v1/*", b"/tokenize", b"/gpu1/v1", False),
        ("/v1/*", b"/sleep", b"/gpu1/v1", False),
        ("/v1/sleep", b"/sleep", b"/gpu1/v1", False),
        ("/sleep", b"/unheard-of", b"/gpu1/sleep", False),
        ("/plugin", b"/unheard-of", b"/gpu1/plugin", False),
        ("/plugin/unheard-of", b"/unheard-of", b"/gpu1/plugin", False),
        ("/plugin", b"/plugin", b"/gpu1/plugin", True),
    ],
)
def test_behind_a_longer_base_a_route_is_what_it_is_judged_to_be(
    entry: str, path: bytes, base: bytes, expected: bool
) -> None:
    forwarded = base.rstrip(b"/") + path
    assert routes(entry).opens(group_for(forwarded, base), forwarded, base) is expected


def test_only_the_master_key_gives_what_only_it_may() -> None:
    for entry, path in (("admin", b"/sleep"), ("/sleep", b"/sleep"), ("/plugin", b"/plugin")):
        assert opens(routes(entry), path)
        assert routes(entry).is_elevated
        assert not opens(routes(entry, master=False), path)
        assert not routes(entry, master=False).is_elevated
    assert not routes("management_routes", master=False).may_manage("/key/generate")
    assert not routes("/key/generate", master=False).may_manage("/key/generate")
    assert not routes("/v1", "/*", "inference", "/v1/models/*", "/vllm/v1/chat").is_elevated


def test_a_type_bounds_what_its_routes_may_open() -> None:
    for entry in ("/v1/chat", "inference", "/*", "admin", "/sleep"):
        for key_type in ("read_only", "management"):
            policy = routes(entry, key_type=key_type)
            assert not opens(policy, CHAT)
            assert not opens(policy, b"/sleep")
            assert not policy.is_elevated
    assert opens(routes("/metrics", key_type="read_only"), b"/metrics")
    assert not opens(routes("/metrics", key_type="read_only"), b"/health")
    assert not opens(routes("/metrics", key_type="management"), b"/metrics")


def test_routes_of_the_key_api() -> None:
    assert routes("management_routes").may_manage("/key/delete")
    assert routes("/key/generate").may_manage("/key/generate")
    assert not routes("/key/generate").may_manage("/key/delete")
    assert routes("/key/*").may_manage("/key/delete")
    assert routes("/key").is_elevated
    for entry in ("/*", "/", "/k*", "inference", "admin", "info_routes"):
        assert not routes(entry).may_manage("/key/generate")
    # Its own row is all that such an entry shows.
    assert routes("/key/info").may_read("/key/info")
    assert not routes("/key/info").may_read("/key/list")
    assert not routes("/key/info").may_manage("/key/info")
    assert not routes("/key/info").is_elevated
    assert not routes("/v1/chat").may_read("/key/info")
    assert routes("info_routes").may_read("/key/info")
    narrow = routes("/key/list", key_type="management")
    assert narrow.may_manage("/key/list")
    assert not narrow.may_manage("/key/generate")


@pytest.mark.parametrize(
    "entry",
    ["", "*", "v1/chat", "/v1/*/x", "/**", "//x", "/a/../b", "/%76", "/a?b", "/a b\n", "/é", "/\udc80", "openai"],
)
def test_what_is_no_route(entry: str) -> None:
    with pytest.raises(ValueError, match=r"a path"):
        parse_route(entry)


def test_an_unknown_type_opens_nothing() -> None:
    with pytest.raises(ValueError, match=r"key_type"):
        compile_policy("newer", (), granted_by_master=True)


def test_a_key_compiles_its_policy_once() -> None:
    key = VirtualKey(token="t", key_name="k", allowed_routes=("/v1/chat",))
    assert key.policy is key.policy


ENTRIES = st.sampled_from(["/v1/chat", "/v1/*", "/*", "/", "/s*", "inference", "info", "llm_api_routes", "/vllm"])
SPELT = st.lists(
    st.sampled_from([*(c.encode() for c in string.ascii_letters + "./_%*?;\\"), b"%2e", b"%2F", b"v1", b"chat", b"/"]),
    max_size=12,
).map(lambda parts: b"/" + b"".join(parts))


@given(
    st.lists(ENTRIES, min_size=1), st.sampled_from(sorted(KEY_TYPES)), SPELT, st.sampled_from([b"", b"/gpu1", b"/v1"])
)
def test_nothing_ambiguous_passes(entries: list[str], key_type: str, path: bytes, base: bytes) -> None:
    """Broad entries open inference and info routes only, however a path is spelt."""
    if opens(routes(*entries, key_type=key_type), path, base):
        assert group_for(base + path, base) in ("inference", "info")
