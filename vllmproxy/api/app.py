"""The Klein app: everything that is not under ``/vllm``."""

from collections.abc import Awaitable, Callable

from klein import Klein
from twisted.internet.defer import succeed
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure
from twisted.web.http import Request as HTTPRequest
from twisted.web.iweb import IRequest
from twisted.web.resource import IResource, Resource
from twisted.web.server import Request, Site
from werkzeug.exceptions import HTTPException

from vllmproxy import PRODUCT
from vllmproxy.api.audit import AuditApi
from vllmproxy.api.errors import answer_error, answer_json, error_of
from vllmproxy.api.health import HealthApi
from vllmproxy.api.keys import KeyApi, TellUsage
from vllmproxy.api.keyviews import KeyViewApi
from vllmproxy.api.metrics import MetricsApi, MetricsText
from vllmproxy.api.usage import UsageApi
from vllmproxy.errors import BadRequest
from vllmproxy.keys.gate import Gate
from vllmproxy.store.interface import Store


class Api:
    """Puts the rooms of the API together.

    :param clock: ``seconds()`` is the time of day, seconds since the epoch.
    :param metrics_text: returns the content type and the body of ``/metrics``, or what fires with them.
    :param open_metrics: show the metrics to everybody.
    :param is_well: tells whether vLLM answers.
    :param priced: there are prices, so that budgets of money can be kept.
    :param tell_usage: has the store told of all that was used until now, as far as that can be done soon.
    :param workers: how many processes are at work, and of how many; ``None`` where there is this one only.
    :ivar routes: the paths that it answers, variable parts in angle brackets.
    """

    def __init__(
        self,
        gate: Gate,
        store: Store,
        clock: IReactorTime,
        *,
        metrics_text: MetricsText,
        open_metrics: bool,
        version: str,
        is_well: Callable[[], Awaitable[bool]],
        is_stopping: Callable[[], bool] = lambda: False,
        priced: bool = False,
        tell_usage: TellUsage = lambda: succeed(None),
        workers: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self._clock = clock
        self._version = version
        self._app = app = Klein()
        # Klein's defaults answer // and a missing slash with redirects.
        app.url_map.merge_slashes = app.url_map.strict_slashes = False
        app.route("/", methods=["GET"])(self.index)
        KeyApi(gate, store, clock, tell_usage, priced=priced).register(app)
        KeyViewApi(gate, store, clock).register(app)
        UsageApi(gate, store, clock).register(app)
        AuditApi(gate, store).register(app)
        HealthApi(store, version, is_well, is_stopping, workers).register(app)
        MetricsApi(gate, metrics_text, open_metrics).register(app)
        app.handle_errors(Exception)(_explain)
        self.routes = frozenset(str(rule.rule) for rule in app.url_map.iter_rules())

    def resource(self) -> IResource:
        """Return the leaf resource that answers every path."""
        return _Root(self._app.resource())

    def site(self) -> Site:
        """Return the site around :meth:`resource`, for a channel that drives ``twisted.web`` requests."""
        return _QuietSite(self.resource(), reactor=self._clock)  # type: ignore[no-untyped-call]  # nor has Site's

    async def index(self, request: IRequest) -> bytes:
        """Say what this is and where things are."""
        places = {
            "vllm": "/vllm/",
            "keys": "/key/generate",
            "health": "/health/readiness",
            "metrics": "/metrics",
        }
        return answer_json(request, {"name": "vllmproxy", "version": self._version, **places})


def _explain(request: IRequest, failure: Failure) -> bytes:
    return answer_error(request, error_of(failure, request.path))


class _QuietSite(Site):
    """Without Twisted's own access log, which writes the query down, and with it ``/key/info?key=…``."""

    def log(self, request: HTTPRequest) -> None:
        """Log nothing: finished requests are the observers' business."""


class _Root(Resource):
    """Klein's resource behind the checks whose failure Klein answers outside its error handlers."""

    isLeaf = True

    def __init__(self, klein: IResource) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Resource.__init__ has no annotations
        self._klein = klein

    def render(self, request: Request) -> bytes | int:
        request.responseHeaders.setRawHeaders(b"server", [PRODUCT])
        try:
            b"/".join(request.postpath or ()).decode()
            request.method.decode("ascii")
            answer: bytes | int = self._klein.render(request)
        except (UnicodeDecodeError, HTTPException):
            # The path or the method is no text, or werkzeug cannot make sense of Host.
            return answer_error(request, BadRequest("The request cannot be understood."))
        return answer
