import pytest

from vllmproxy.inspection.routes import bounds_of, needed_of, streams_usage, takes_model
from vllmproxy.keys.routes import KNOWN_ROUTES, group_of
from vllmproxy.relay.demand import work_of


@pytest.mark.parametrize(
    ("method", "path", "takes"),
    [
        ("POST", "/v1/chat/completions", True),
        ("POST", "/v1/chat/completions/batch", True),
        ("PUT", "/v1/completions", True),
        ("PATCH", "/v1/responses", True),
        ("POST", "/v1/audio/transcriptions", True),
        ("POST", "/v1/messages/count_tokens", True),
        ("POST", "/tokenize", True),
        ("POST", "/invocations", True),
        ("POST", "/v1/something-new", True),
        ("BREW", "/v1/chat/completions", True),
        ("GET", "/v1/chat/completions", False),
        ("HEAD", "/v1/responses", False),
        ("OPTIONS", "/v1/chat/completions", False),
        ("GET", "/v1/responses/resp_1", False),
        ("DELETE", "/v1/responses/resp_1", False),
        ("POST", "/v1/responses/resp_1/cancel", False),
        ("POST", "/v1/responses/resp_1/x/cancel", True),
        ("POST", "/v1/responses/cancel", True),
        ("GET", "/v1/realtime", False),
    ],
)
def test_takes_model(method: str, path: str, takes: bool) -> None:
    assert takes_model(method, path) is takes


def test_every_known_inference_route_takes_a_model() -> None:
    paths = [path.decode() for path in KNOWN_ROUTES if group_of(path) == "inference"]
    assert paths
    assert [path for path in paths if not takes_model("POST", path)] == []


def test_streams_usage() -> None:
    paths = {path.decode() for path in KNOWN_ROUTES if streams_usage(path.decode())}
    assert paths == {"/invocations", "/v1/chat/completions", "/v1/completions"}
    assert all(needed_of(path) for path in paths)
    assert not needed_of("/v1/responses")


def test_a_route_that_writes_has_bounds_or_takes_others() -> None:
    paths = {path.decode() for path in KNOWN_ROUTES if group_of(path) == "inference"}
    writing = {path for path in paths if work_of(path) == "writes"}
    bounded = {path for path in paths if bounds_of(path)}
    assert writing - bounded == {"/invocations", "/v1/realtime"}
    assert bounded <= writing
