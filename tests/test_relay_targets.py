"""Which path at the upstream a target means, and which ``Location`` here an upstream's means."""

import re
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmproxy.relay.targets import PREFIX, is_under_prefix, is_unsafe, local_location, split_target, upstream_path


@pytest.mark.parametrize("target", [b"/vllm", b"/vllm/", b"/vllm?x", b"/vllm/v1/x", b"/vllm//", b"/vllm/../x"])
def test_under_the_prefix(target: bytes) -> None:
    assert is_under_prefix(target)


@pytest.mark.parametrize(
    "target", [b"/", b"/vllmx", b"/VLLM/", b"/v1/vllm", b"/%76llm/x", b"/vllm;x", b"/vllm%2fx", b""]
)
def test_not_under_the_prefix(target: bytes) -> None:
    assert not is_under_prefix(target)


@pytest.mark.parametrize(
    ("path", "base", "forwarded"),
    [
        (b"/vllm", b"", b"/"),
        (b"/vllm/", b"", b"/"),
        (b"/vllm/v1/chat/completions", b"", b"/v1/chat/completions"),
        (b"/vllm/chat/completions", b"", b"/v1/chat/completions"),
        (b"/vllm/completions", b"", b"/v1/completions"),
        (b"/vllm/models/", b"", b"/v1/models/"),
        (b"/vllm/messages/count_tokens", b"", b"/v1/messages/count_tokens"),
        (b"/vllm/responses/resp_1/cancel", b"", b"/v1/responses/resp_1/cancel"),
        (b"/vllm/embeddings", b"", b"/v1/embeddings"),
        (b"/vllm/audio/transcriptions", b"", b"/v1/audio/transcriptions"),
        (b"/vllm/realtime", b"", b"/v1/realtime"),
        (b"/vllm/metrics", b"", b"/metrics"),
        (b"/vllm/modelsx", b"", b"/modelsx"),
        (b"/vllm/CHAT/completions", b"", b"/CHAT/completions"),
        (b"/vllm/a%20b/%C3%A9/", b"", b"/a%20b/%C3%A9/"),
        (b"/vllm/chat/completions", b"/v1", b"/v1/chat/completions"),
        (b"/vllm/metrics", b"/v1", b"/v1/metrics"),
        (b"/vllm", b"/v1", b"/v1/"),
        (b"/vllm/v1/models", b"/gpu1", b"/gpu1/v1/models"),
    ],
)
def test_upstream_path(path: bytes, base: bytes, forwarded: bytes) -> None:
    assert upstream_path(path, base) == forwarded


@pytest.mark.parametrize(
    "path",
    [
        b"/vllm/..",
        b"/vllm/../x",
        b"/vllm/./x",
        b"/vllm/x/.",
        b"/vllm/%2e%2E/x",
        b"/vllm/.%2e/x",
        b"/vllm/%2E",
        b"/vllm//x",
        b"/vllm/x//",
        b"/vllm/x;y",
        b"/vllm/a%2fb",
        b"/vllm/a%2Fb",
        b"/vllm/a%5cb",
        b"/vllm/a%5Cb",
        b"/vllm/a\\b",
        b"/vllm/a%00",
    ],
)
def test_unsafe_paths(path: bytes) -> None:
    assert is_unsafe(path)


@pytest.mark.parametrize(
    "path",
    [
        b"/vllm",
        b"/vllm/",
        b"/vllm/v1/x",
        b"/vllm/...",
        b"/vllm/.x",
        b"/vllm/x.",
        b"/vllm/a..b",
        b"/vllm/%20%41",
        b"/vllm/%252e",
    ],
)
def test_safe_paths(path: bytes) -> None:
    assert not is_unsafe(path)


TARGETS = st.lists(
    st.sampled_from(
        [
            b"/",
            b".",
            b"..",
            b"%2e",
            b"%2E",
            b"%2f",
            b"%5c",
            b"%00",
            b"%3b",
            b";",
            b"\\",
            b"a",
            b"chat",
            b"v1",
            b"%25",
            b"?",
            b"=",
        ]
    ),
    max_size=10,
).map(b"".join)


@given(TARGETS)
def test_what_passes_can_be_read_in_one_way_only(rest: bytes) -> None:
    path, query = split_target(PREFIX + b"/" + rest)
    assert path + query == PREFIX + b"/" + rest
    assert b"?" not in path
    decoded = unquote_to_bytes(path)
    segments = re.split(rb"[/\\]", decoded)
    ambiguous = (
        any(segment in (b".", b"..") for segment in segments)
        or b"//" in decoded
        or b"\\" in decoded
        or b"\x00" in decoded
        or b";" in path
        or decoded.count(b"/") != path.count(b"/")
    )
    assert is_unsafe(path) or not ambiguous


@given(TARGETS, st.sampled_from([b"", b"/v1", b"/gpu1/v1"]))
def test_what_is_forwarded_is_what_was_sent(rest: bytes, base: bytes) -> None:
    path, query = split_target(PREFIX + b"/" + rest)
    forwarded = upstream_path(path, base)
    sent = path[len(PREFIX) :]
    assert forwarded in ([base + sent] if base else [sent, b"/v1" + sent])
    assert forwarded.startswith(b"/")
    assert (path + query).endswith(query)


@pytest.mark.parametrize(
    ("location", "base", "local"),
    [
        (b"/v1/models", b"", b"/vllm/v1/models"),
        (b"/v1/models?a=b#c", b"", b"/vllm/v1/models?a=b#c"),
        (b"http://gpu1:8000/docs/", b"", b"/vllm/docs/"),
        (b"HTTPS://GPU1:8000/docs/?x", b"", b"/vllm/docs/?x"),
        (b"//gpu1:8000/docs", b"", b"/vllm/docs"),
        (b"http://gpu1:8000", b"", b"/vllm/"),
        (b"http://gpu1:8000?x=/", b"", b"/vllm/?x=/"),
        (b"http://gpu1:8000/v1/x", b"/v1", b"/vllm/x"),
        (b"/v1/x/", b"/v1", b"/vllm/x/"),
        (b"/v1", b"/v1", b"/vllm"),
        (b"/v1?x", b"/v1", b"/vllm?x"),
        (b"/v1x/y", b"/v1", b"/vllm/v1x/y"),
        (b"relative/path", b"", b"relative/path"),
        (b"?x", b"", b"?x"),
        (b"", b"", b""),
        (b"http://elsewhere/x", b"", b"http://elsewhere/x"),
        (b"//elsewhere/x", b"", b"//elsewhere/x"),
        (b"http://gpu1:8000@elsewhere/x", b"", b"http://gpu1:8000@elsewhere/x"),
        (b"http://gpu1:80000/x", b"", b"http://gpu1:80000/x"),
        (b"mailto:x@y", b"", b"mailto:x@y"),
    ],
)
def test_local_location(location: bytes, base: bytes, local: bytes) -> None:
    assert local_location(location, b"gpu1:8000", base) == local


@pytest.mark.parametrize(
    ("location", "authority"),
    [(b"http://gpu1:80/x", b"gpu1"), (b"https://gpu1:443/x", b"gpu1"), (b"http://[::1]:80/x", b"[::1]")],
)
def test_a_location_may_write_out_the_schemes_own_port(location: bytes, authority: bytes) -> None:
    assert local_location(location, authority, b"") == b"/vllm/x"


@given(st.binary(max_size=30), st.sampled_from([b"", b"/v1"]))
def test_a_location_never_names_the_upstream(location: bytes, base: bytes) -> None:
    for given_location in (location, b"http://gpu1:8000" + location):
        local = local_location(given_location, b"gpu1:8000", base)
        assert local == given_location or local.startswith(PREFIX)


@given(TARGETS.filter(lambda rest: b"?" not in rest), st.sampled_from([b"/gpu1", b"/gpu1/v1"]))
def test_following_a_location_comes_back_to_it(rest: bytes, base: bytes) -> None:
    location = base + b"/" + rest
    assert upstream_path(local_location(location, b"gpu1:8000", base), base) == location
