"""How full it is, as Prometheus reads it."""

from prometheus_client import CollectorRegistry
from test_observers_metrics import read

from vllmproxy.observers.metrics import MetricsObserver
from vllmproxy.observers.occupancy import Occupancy, OccupancyCollector


def test_what_is_taken_and_who_was_turned_away() -> None:
    metrics = MetricsObserver(CollectorRegistry())
    now = [Occupancy(5, 6, 3, 2, 4096, {"no_place": 7}, {"line_full": 8, "late": 9, "client_full": 1})]
    metrics.add(OccupancyCollector(lambda: now[-1]))
    assert read(metrics, "vllmproxy_connections") == 5
    assert read(metrics, "vllmproxy_evicted_connections_total") == 6
    assert read(metrics, "vllmproxy_relayed_requests") == 3
    assert read(metrics, "vllmproxy_waiting_requests") == 2
    assert read(metrics, "vllmproxy_usage_journal_bytes") == 4096
    expected = {
        "max-connections": 7,
        "max-connections-per-client": 0,
        "max-requests": 0,
        "max-waiting": 8,
        "waiting-timeout": 9,
        "max-requests-per-client": 1,
    }
    for setting, count in expected.items():
        assert read(metrics, "vllmproxy_turned_away_total", setting=setting) == count
    now.append(Occupancy(1, 6, 0, 0, 0))
    assert read(metrics, "vllmproxy_connections") == 1
