"""Counters of finished requests, for Prometheus."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from vllmproxy.observers.histogram import Histogram, histogram_family
from vllmproxy.observers.record import RequestRecord

_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"))
_OTHER = "other"

_Key = tuple[str, str, int, str]


class MetricsObserver(Collector):
    """Counts in plain Python as requests end, and makes Prometheus' samples of it only when asked.

    No label takes a value that a caller could choose freely, so the number of series is bounded.

    The ``litellm_`` names are LiteLLM's, for dashboards that have them, with those of its labels that are
    bounded. As there, the latency histograms take only requests that succeeded.

    :param registry: where to register; by default one of its own, with process and Python information.
    :param known_routes: the paths that may be a ``route`` label; all others are ``other``.
    """

    def __init__(
        self, registry: CollectorRegistry | None = None, known_routes: Iterable[bytes | str] = frozenset()
    ) -> None:
        self._routes = {r if isinstance(r, str) else r.decode("latin-1") for r in known_routes}
        self._in_flight = 0
        self._requests: dict[_Key, int] = {}
        self._bytes_in = self._bytes_out = 0
        self._prompt = self._completion = self._total = 0
        self._first_byte: dict[str, Histogram] = {}
        self._duration: dict[str, Histogram] = {}
        self._succeeded = Histogram()
        self._first_token = Histogram()
        self._registry = CollectorRegistry() if registry is None else registry
        self._registry.register(self)
        if registry is None:
            ProcessCollector(registry=self._registry)
            PlatformCollector(registry=self._registry)

    def add(self, collector: Collector) -> None:
        """Show what ``collector`` has, too."""
        self._registry.register(collector)

    def text(self) -> tuple[bytes, bytes]:
        """Return the content type and the body of ``GET /metrics``."""
        return CONTENT_TYPE_LATEST.encode(), generate_latest(self._registry)

    def families(self) -> list[Metric]:
        """Return what :meth:`text` is made of."""
        return list(self._registry.collect())

    def started(self) -> None:
        """Count one more request in flight."""
        self._in_flight += 1

    def finished(self, record: RequestRecord) -> None:
        """Count ``record``."""
        self._in_flight -= 1
        route = record.route if record.route in self._routes else _OTHER
        method = record.method if record.method in _METHODS else _OTHER
        key = (route, method, record.status, record.ended)
        self._requests[key] = self._requests.get(key, 0) + 1
        self._bytes_in += record.bytes_in
        self._bytes_out += record.bytes_out
        if (duration := self._duration.get(route)) is None:
            duration = self._duration[route] = Histogram()
        duration.observe(record.duration)
        if record.time_to_first_byte is not None:
            if (first_byte := self._first_byte.get(route)) is None:
                first_byte = self._first_byte[route] = Histogram()
            first_byte.observe(record.time_to_first_byte)
        self._count_tokens(record)
        if record.ended == "done" and 0 < record.status < 400:
            self._succeeded.observe(record.duration)
            if record.streamed and record.time_to_first_byte is not None:
                self._first_token.observe(record.time_to_first_byte)

    def _count_tokens(self, record: RequestRecord) -> None:
        prompt, completion = record.prompt_tokens or 0, record.completion_tokens or 0
        self._prompt += prompt
        self._completion += completion
        self._total += prompt + completion if record.total_tokens is None else record.total_tokens

    def collect(self) -> Iterator[Metric]:
        """Yield everything as Prometheus' metric families; called by the registry."""
        yield self._request_counts()
        yield GaugeMetricFamily("vllmproxy_in_flight_requests", "Requests begun and not over", self._in_flight)
        yield CounterMetricFamily("vllmproxy_request_bytes", "Request body bytes from clients", self._bytes_in)
        yield CounterMetricFamily("vllmproxy_response_bytes", "Response body bytes to clients", self._bytes_out)
        tokens = CounterMetricFamily("vllmproxy_tokens", "Tokens that answers told of", labels=["kind"])
        tokens.add_metric(["prompt"], self._prompt)
        tokens.add_metric(["completion"], self._completion)
        yield tokens
        yield histogram_family(
            "vllmproxy_time_to_first_byte_seconds",
            "From the request's head to the first byte of vLLM's answer",
            by_route=self._first_byte,
        )
        yield histogram_family(
            "vllmproxy_request_duration_seconds",
            "From the request's head to its end",
            by_route=self._duration,
        )
        yield from self._under_litellm_names()

    def _request_counts(self) -> Metric:
        family = CounterMetricFamily(
            "vllmproxy_requests", "Requests that are over", labels=["route", "method", "status", "ended"]
        )
        for (route, method, status, ended), count in self._requests.items():
            family.add_metric([route, method, str(status), ended], count)
        return family

    def _under_litellm_names(self) -> Iterator[Metric]:
        yield self._litellm_counts(
            "litellm_proxy_total_requests_metric", "Requests to the proxy", "status_code", self._requests
        )
        failed = {key: count for key, count in self._requests.items() if key[2] >= 400 or key[3] == "upstream_failed"}
        yield self._litellm_counts(
            "litellm_proxy_failed_requests_metric", "Requests that failed", "exception_status", failed
        )
        yield CounterMetricFamily("litellm_total_tokens_metric", "Prompt and completion tokens", self._total)
        yield histogram_family(
            "litellm_request_total_latency_metric",
            "Seconds that a successful request took",
            only=self._succeeded,
        )
        yield histogram_family(
            "litellm_llm_api_time_to_first_token_metric",
            "Seconds to the first byte of a successful stream",
            only=self._first_token,
        )
        yield GaugeMetricFamily("litellm_in_flight_requests", "Requests in flight", self._in_flight)

    @staticmethod
    def _litellm_counts(name: str, documentation: str, status_label: str, requests: dict[_Key, int]) -> Metric:
        sums: dict[tuple[str, int], int] = {}
        for (route, _, status, _), count in requests.items():
            sums[route, status] = sums.get((route, status), 0) + count
        family = CounterMetricFamily(name, documentation, labels=["route", status_label])
        for (route, status), count in sums.items():
            family.add_metric([route, str(status)], count)
        return family
