"""What the simulated vLLM counted, for the tests that ask, and in vLLM's own ``/metrics``."""

from collections import Counter, OrderedDict
from typing import Any

from attrs import Factory, define

_EXECUTED_KEPT = 16384
_REASONS = ("stop", "length", "abort", "error", "repetition")
#: How many requests at once would count as a full KV cache.
_CACHE_SLOTS = 256


@define(slots=True)
class Stats:
    """Counters of one server; all but the two gauges go to zero on :meth:`reset`.

    :ivar requests: requests begun, by route; paths that vLLM does not have count as ``unknown``.
    :ivar executed: POSTs whose body was complete, by request id; the oldest are forgotten.
    :ivar admin: requests that reached an administrative route, by path.
    :ivar aborts: answers that the client did not wait for.
    :ivar events: SSE events sent, comments left out.
    :ivar bytes_received: raw bytes read from sockets.
    :ivar connections_open: gauge.
    :ivar running: gauge, answers in the making.
    :ivar finished: generations by ``finished_reason``.
    """

    requests: Counter[str] = Factory(Counter)
    executed: OrderedDict[str, int] = Factory(OrderedDict)
    admin: Counter[str] = Factory(Counter)
    finished: Counter[str] = Factory(Counter)
    aborts: int = 0
    events: int = 0
    bytes_received: int = 0
    connections_total: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    connections_open: int = 0
    running: int = 0

    def execute(self, request_id: str) -> None:
        """Count one whole POST under its request id."""
        self.executed[request_id] = self.executed.pop(request_id, 0) + 1
        if len(self.executed) > _EXECUTED_KEPT:
            self.executed.popitem(last=False)

    def reset(self) -> None:
        """Zero every counter; open connections and running answers stay what they are."""
        for counters in (self.requests, self.executed, self.admin, self.finished):
            counters.clear()
        self.aborts = self.events = self.bytes_received = self.connections_total = 0
        self.prompt_tokens = self.generation_tokens = 0

    def as_json(self) -> dict[str, Any]:
        """Return all of it, ready for ``json.dumps``."""
        return {
            "requests": dict(self.requests),
            "executed": dict(self.executed),
            "admin": dict(self.admin),
            "finished": dict(self.finished),
            "aborts": self.aborts,
            "events": self.events,
            "bytes_received": self.bytes_received,
            "connections_total": self.connections_total,
            "connections_open": self.connections_open,
            "running": self.running,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
        }

    def exposition(self, model: str) -> str:
        """Return the counters as vLLM's ``/metrics`` text, under vLLM's names and labels."""
        labels = f'engine="0",model_name="{model}"'
        lines: list[str] = []
        for name, kind, help_text, value in self._families():
            lines += [f"# HELP vllm:{name} {help_text}", f"# TYPE vllm:{name} {kind}"]
            lines.append(f"vllm:{name}{{{labels}}} {float(value)}")
        name = "request_success_total"
        lines += [
            f"# HELP vllm:{name} Count of successfully processed requests.",
            f"# TYPE vllm:{name} counter",
        ]
        for reason in _REASONS:
            label = f'engine="0",finished_reason="{reason}",model_name="{model}"'
            lines.append(f"vllm:{name}{{{label}}} {float(self.finished[reason])}")
        return "\n".join(lines) + "\n"

    def _families(self) -> list[tuple[str, str, str, float]]:
        cache = min(1.0, self.running / _CACHE_SLOTS)
        return [
            ("num_requests_running", "gauge", "Number of requests in model execution batches.", self.running),
            ("num_requests_waiting", "gauge", "Number of requests waiting to be processed.", 0),
            ("kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.", cache),
            ("prefix_cache_queries_total", "counter", "Prefix cache queries, in tokens.", self.prompt_tokens),
            ("prefix_cache_hits_total", "counter", "Prefix cache hits, in tokens.", 0),
            ("prompt_tokens_total", "counter", "Number of prefill tokens processed.", self.prompt_tokens),
            (
                "generation_tokens_total",
                "counter",
                "Number of generation tokens processed.",
                self.generation_tokens,
            ),
        ]
