"""The metrics of several processes as those of one: what one observer says that saw all."""

import json
import re

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllmproxy.observers.metrics import MetricsObserver
from vllmproxy.observers.record import RequestRecord
from vllmproxy.workers.sums import Shown, Sums, shown

ROUTES = ("/v1/models", "/v1/chat/completions")
records = st.builds(
    RequestRecord,
    time=st.just(0.0),
    request_id=st.just("r"),
    method=st.sampled_from(["GET", "POST"]),
    route=st.sampled_from([*ROUTES, "/elsewhere"]),
    status=st.sampled_from([200, 429, 502]),
    duration=st.sampled_from([0.0009765625, 0.5, 1024.0]),
    time_to_first_byte=st.sampled_from([None, 0.25]),
    prompt_tokens=st.sampled_from([None, 5]),
    bytes_out=st.integers(0, 1000),
)


def observer() -> MetricsObserver:
    return MetricsObserver(CollectorRegistry(), ROUTES)


def travelled(families: list[Metric]) -> Shown:
    """As the other process gets it."""
    made: Shown = json.loads(json.dumps(shown(families)))
    return made


def values(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@given(st.lists(st.tuples(st.integers(0, 2), records), max_size=30))
def test_the_sum_is_what_one_would_have_counted(finished: list[tuple[int, RequestRecord]]) -> None:
    alone, several = observer(), [observer() for _ in range(3)]
    for worker, record in finished:
        for each in (alone, several[worker]):
            each.started()
            each.finished(record)
    sums = Sums()
    for number, each in enumerate(several, 1):
        sums.add(travelled(each.families()), str(number))
    assert values(generate_latest(sums).decode()) == values(alone.text()[1].decode())


def test_what_a_process_had_counted_outlives_it_and_its_gauges_do_not() -> None:
    one = observer()
    for _ in range(3):
        one.started()
    one.finished(RequestRecord(time=0.0, request_id="r", method="GET", route="/v1/models", status=200))
    kept, sums = Sums(), Sums()
    kept.keep(travelled(one.families()))
    kept.keep(travelled(one.families()))
    sums.add(kept.shown(), "")
    sums.add(travelled(one.families()), "1")
    text = generate_latest(sums).decode()
    found = values(text)
    labels = (("ended", "done"), ("method", "GET"), ("route", "/v1/models"), ("status", "200"))
    assert found["vllmproxy_requests_total", labels] == 3
    assert found["vllmproxy_request_duration_seconds_count", (("route", "/v1/models"),)] == 3
    assert found["vllmproxy_in_flight_requests", ()] == 2


def test_each_process_has_its_own_numbers_of_itself() -> None:
    sums, kept = Sums(), Sums()
    families = travelled(MetricsObserver().families())
    for worker in ("1", "2"):
        sums.add(families, worker)
    kept.keep(families)
    text = generate_latest(sums).decode()
    assert re.findall(r'(?m)^process_resident_memory_bytes\{worker="(\d)"\} ', text) == ["1", "2"]
    assert len(re.findall(r'(?m)^python_info\{.*worker="\d".*\} 1.0$', text)) == 2
    assert not [name for name, *_ in kept.shown() if name.startswith(("process_", "python_"))]
