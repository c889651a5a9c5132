"""``GET /metrics``: the proxy's own numbers, for Prometheus. vLLM's are at ``/vllm/metrics``."""

from collections.abc import Callable

from klein import Klein
from twisted.internet.defer import Deferred
from twisted.web.iweb import IRequest

from vllmproxy.api.caller import caller_of, is_local
from vllmproxy.api.errors import answer
from vllmproxy.errors import Forbidden
from vllmproxy.keys.gate import Gate

MetricsText = Callable[[], tuple[bytes, bytes] | Deferred[tuple[bytes, bytes]]]


class MetricsApi:
    """The handler.

    :param text: returns the content type and the body, or what fires with them.
    :param is_open: let everybody read them (``--open-metrics``), not only this machine and the master key.
    """

    def __init__(self, gate: Gate, text: MetricsText, is_open: bool) -> None:
        self._gate = gate
        self._text = text
        self._is_open = is_open

    def register(self, app: Klein) -> None:
        """Add the route to ``app``."""
        app.route("/metrics", methods=["GET"])(self.metrics)

    async def metrics(self, request: IRequest) -> bytes:
        """Answer with the metrics, to those who may read them."""
        if not (self._is_open or is_local(request) or (await caller_of(self._gate, request)).is_master):
            raise Forbidden(
                "The proxy's own metrics are for the master key and for this machine itself; "
                "start with --open-metrics to show them to everybody. vLLM's are at /vllm/metrics."
            )
        made = self._text()
        content_type, body = await made if isinstance(made, Deferred) else made
        return answer(request, content_type, body)
