"""The counters behind GET /metrics, read back with prometheus-client's own parser."""

from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from vllmproxy.observers.metrics import MetricsObserver
from vllmproxy.observers.record import RequestRecord

CHAT = "/v1/chat/completions"
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
DONE = RequestRecord(
    time=0.0,
    request_id="r",
    method="POST",
    route=CHAT,
    key_alias="secret-alias",
    end_user="secret-user",
    model="secret-model",
    status=200,
    bytes_in=10,
    bytes_out=20,
    time_to_first_byte=0.2,
    streamed=True,
    duration=3.0,
    prompt_tokens=11,
    completion_tokens=4,
    total_tokens=15,
)


def offer(metrics: MetricsObserver, *records: RequestRecord) -> None:
    for record in records:
        metrics.started()
        metrics.finished(record)


def samples(metrics: MetricsObserver) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    content_type, body = metrics.text()
    assert content_type.startswith(b"text/plain")
    families = text_string_to_metric_families(body.decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def read(metrics: MetricsObserver, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset(labels.items())]


def test_requests_are_counted_by_route_method_status_and_end() -> None:
    metrics = MetricsObserver(known_routes=frozenset((CHAT.encode(), "/v1/models")))
    offer(metrics, DONE, DONE, evolve(DONE, status=401, ended="refused"), evolve(DONE, route="/v1/models"))
    name = "vllmproxy_requests_total"
    assert read(metrics, name, route=CHAT, method="POST", status="200", ended="done") == 2
    assert read(metrics, name, route=CHAT, method="POST", status="401", ended="refused") == 1
    assert read(metrics, name, route="/v1/models", method="POST", status="200", ended="done") == 1


def test_sums_and_those_in_flight() -> None:
    metrics = MetricsObserver()
    offer(metrics, DONE, evolve(DONE, prompt_tokens=None, completion_tokens=None, total_tokens=None))
    metrics.started()
    assert read(metrics, "vllmproxy_in_flight_requests") == 1
    assert read(metrics, "litellm_in_flight_requests") == 1
    assert read(metrics, "vllmproxy_request_bytes_total") == 20
    assert read(metrics, "vllmproxy_response_bytes_total") == 40
    assert read(metrics, "vllmproxy_tokens_total", kind="prompt") == 11
    assert read(metrics, "vllmproxy_tokens_total", kind="completion") == 4
    assert read(metrics, "litellm_total_tokens_metric_total") == 15


def test_a_total_that_is_not_told_is_the_sum() -> None:
    metrics = MetricsObserver()
    offer(metrics, evolve(DONE, total_tokens=None, prompt_tokens=None))
    assert read(metrics, "litellm_total_tokens_metric_total") == 4


def test_histograms_by_route() -> None:
    metrics = MetricsObserver(known_routes=[CHAT])
    offer(metrics, DONE, evolve(DONE, duration=1000.0, time_to_first_byte=None), evolve(DONE, duration=0.005))
    name = "vllmproxy_request_duration_seconds"
    bounds = ("0.005", "2.5", "5.0", "600.0", "+Inf")
    assert [read(metrics, f"{name}_bucket", route=CHAT, le=le) for le in bounds] == [1, 1, 2, 2, 3]
    assert read(metrics, f"{name}_count", route=CHAT) == 3
    assert read(metrics, f"{name}_sum", route=CHAT) == 1003.005
    assert read(metrics, "vllmproxy_time_to_first_byte_seconds_count", route=CHAT) == 2


def test_litellm_names_mean_what_they_mean_there() -> None:
    metrics = MetricsObserver(known_routes=[CHAT])
    offer(
        metrics,
        DONE,
        evolve(DONE, method="GET"),
        evolve(DONE, status=429, ended="refused"),
        evolve(DONE, status=200, ended="upstream_failed"),
        evolve(DONE, status=200, ended="client_gone"),
        evolve(DONE, status=0, ended="client_gone"),
    )
    total, failed = "litellm_proxy_total_requests_metric_total", "litellm_proxy_failed_requests_metric_total"
    assert read(metrics, total, route=CHAT, status_code="200") == 4
    assert read(metrics, total, route=CHAT, status_code="429") == 1
    assert read(metrics, failed, route=CHAT, exception_status="429") == 1
    assert read(metrics, failed, route=CHAT, exception_status="200") == 1
    assert sum(value for (name, _), value in samples(metrics).items() if name == failed) == 2
    assert read(metrics, "litellm_request_total_latency_metric_count") == 2
    assert read(metrics, "litellm_llm_api_time_to_first_token_metric_sum") == 0.4


def test_process_and_python_are_described_in_its_own_registry_only() -> None:
    assert "python_info" in {name for name, _ in samples(MetricsObserver())}
    assert "process_resident_memory_bytes" in {name for name, _ in samples(MetricsObserver())}
    given_one = CollectorRegistry(auto_describe=True)
    assert "python_info" not in {name for name, _ in samples(MetricsObserver(given_one))}


@given(
    st.lists(
        st.builds(
            RequestRecord,
            time=st.just(0.0),
            request_id=st.text(),
            method=st.text() | st.sampled_from(METHODS),
            route=st.text() | st.just(CHAT),
            client=st.text(),
            key_id=st.text(),
            key_alias=st.text(),
            end_user=st.text(),
            model=st.text(),
            status=st.sampled_from([0, 200]),
            time_to_first_byte=st.floats(0, 1000),
            error=st.text(),
        ),
        max_size=5,
    )
)
def test_whatever_callers_send_the_labels_are_bounded(records: list[RequestRecord]) -> None:
    metrics = MetricsObserver(CollectorRegistry(), known_routes=[CHAT])
    offer(metrics, *records)
    found: dict[str, set[str]] = {}
    for name, labels in samples(metrics):
        for label, value in labels if name.startswith(("vllmproxy_", "litellm_")) else ():
            found.setdefault(label, set()).add(value)
    assert found.pop("route", set()) <= {CHAT, "other"}
    assert found.pop("method", set()) <= {*METHODS, "other"}
    assert set(found) <= {"status", "ended", "le", "kind", "status_code", "exception_status"}
