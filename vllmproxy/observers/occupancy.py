"""How full the proxy is, and whom it has turned away, for Prometheus."""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from attrs import field, frozen
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

#: The settings that turn somebody away, by what :data:`~vllmproxy.http1.places.Entry` calls it.
_CONNECTIONS: Final = {"no_place": "max-connections", "client_full": "max-connections-per-client"}
_REQUESTS: Final = {
    "no_place": "max-requests",
    "line_full": "max-waiting",
    "late": "waiting-timeout",
    "client_full": "max-requests-per-client",
}


@frozen
class Occupancy:
    """What is taken of the places, at one moment.

    :ivar requests: under way under ``/vllm``, and ``waiting`` for that.
    :ivar journal: bytes of usage that is written down and that the store has not got, or that is of requests under way.
    :ivar refused_connections: since the start, by why; ``refused_requests`` as well.
    :ivar evicted: connections without a whole request that lost their place to a new one.
    """

    connections: int
    evicted: int
    requests: int
    waiting: int
    journal: int
    refused_connections: Mapping[str, int] = field(factory=dict)
    refused_requests: Mapping[str, int] = field(factory=dict)


class OccupancyCollector(Collector):
    """Looks when it is asked."""

    def __init__(self, look: Callable[[], Occupancy]) -> None:
        self._look = look

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families; called by the registry."""
        now = self._look()
        yield GaugeMetricFamily("vllmproxy_connections", "Connections from clients", now.connections)
        yield GaugeMetricFamily("vllmproxy_relayed_requests", "Requests under way under /vllm", now.requests)
        yield GaugeMetricFamily("vllmproxy_waiting_requests", "Requests that wait to be under way", now.waiting)
        yield CounterMetricFamily(
            "vllmproxy_evicted_connections",
            "Connections without a whole request that lost their place to a new one",
            now.evicted,
        )
        yield GaugeMetricFamily(
            "vllmproxy_usage_journal_bytes", "Usage that the store has not got, or of requests under way", now.journal
        )
        refused = CounterMetricFamily(
            "vllmproxy_turned_away", "Connections and requests that a setting turned away", labels=["setting"]
        )
        for settings, counts in ((_CONNECTIONS, now.refused_connections), (_REQUESTS, now.refused_requests)):
            for why, setting in settings.items():
                refused.add_metric([setting], counts.get(why, 0))
        yield refused
