"""What becomes of a request: refused at its head, broken as a directive asks, or answered by its route."""

import hmac
from collections.abc import Callable
from functools import partial
from urllib.parse import quote

from vllmproxy.simulator import faults, shapes, stream, websocket
from vllmproxy.simulator.config import SimulatorConfig
from vllmproxy.simulator.cors import allow_origin, preflight
from vllmproxy.simulator.exchange import Exchange, Header
from vllmproxy.simulator.request import BODY_LIMIT, Request
from vllmproxy.simulator.shapes import Ask, Json, Refusal, Reply, Stream, Whole
from vllmproxy.simulator.stats import Stats
from vllmproxy.simulator.table import OPERATOR_ROUTE, is_admin, routes

_GUARDED = ("/v1", "/v2", "/inference", "/cohere")
_REALTIME = "/v1/realtime"
_JSON_ONLY = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"


class Site:
    """Answers requests: the one place that knows every route.

    :param config: what the server was set to.
    :param stats: where it counts.
    """

    def __init__(self, config: SimulatorConfig, stats: Stats) -> None:
        self._config = config
        self._stats = stats
        self._routes = routes(config, stats)

    # -- one request -----------------------------------------------------------------------------------

    def prepare(self, request: Request) -> None:
        """Say what is to be kept of the body of a request whose head is complete, its turn come or not."""
        header = request.header(b"x-vllmsim")
        route = self._routes.get(request.path)
        if header:
            request.hash_body()
        if route is not None and route.takes == "json" and header.partition(";")[0].strip() != "echo":
            request.keep = BODY_LIMIT

    def begin(self, exchange: Exchange) -> None:
        """Decide on a request whose head is complete: refuse it now, or plan its answer for after its body."""
        request = exchange.request
        self._count(request)
        header = request.header(b"x-vllmsim")
        if not self._authorized(request):
            exchange.run(partial(self._unauthorized, exchange))
        elif header:
            self._begin_directive(exchange, header)
        else:
            refusal = self._refusal(exchange)
            if refusal is None:
                self._expect_body(exchange)
                exchange.plan = partial(self._execute, exchange, partial(self._answer, exchange, faults.Params(())))
            else:
                exchange.run(refusal)

    def _begin_directive(self, exchange: Exchange, header: str) -> None:
        try:
            directive, params = faults.parse(header)
            early = bool(params.integer("early"))
        except faults.BadDirective as reason:
            exchange.run(partial(self._refuse, exchange, _bad_directive(reason)))
            return
        proceed = self._refusal(exchange) or partial(self._answer, exchange, params)
        plan = partial(self._execute, exchange, partial(self._direct, exchange, directive, params, proceed))
        if early:
            exchange.run(plan)
            return
        self._expect_body(exchange)
        exchange.plan = plan

    def _direct(
        self,
        exchange: Exchange,
        directive: faults.Directive,
        params: faults.Params,
        proceed: Callable[[], None],
    ) -> None:
        try:
            directive(exchange, params, proceed)
        except faults.BadDirective as reason:
            self._refuse(exchange, _bad_directive(reason))

    def _count(self, request: Request) -> None:
        if request.path.startswith("/vllmsim/"):
            return
        admin, known = is_admin(request.path), request.path in self._routes or request.path == _REALTIME
        self._stats.requests[request.path if admin or known else "unknown"] += 1
        if admin:
            self._stats.admin[request.path] += 1

    def _execute(self, exchange: Exchange, answer: Callable[[], None]) -> None:
        if exchange.request.method == "POST" and not exchange.request.path.startswith("/vllmsim/"):
            self._stats.execute(exchange.request.id)
        answer()

    def _expect_body(self, exchange: Exchange) -> None:
        request = exchange.request
        if request.header(b"expect").lower() == "100-continue" and request.version == "1.1":
            exchange.informational(100)

    # -- refusals at the head --------------------------------------------------------------------------

    def _authorized(self, request: Request) -> bool:
        """As vLLM: only some prefixes are guarded, and OPTIONS never is."""
        key = self._config.api_key
        if key is None or request.method == "OPTIONS" or not request.path.startswith(_GUARDED):
            return True
        scheme, _, shown = request.header(b"authorization").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(shown.encode(), key.encode())

    def _unauthorized(self, exchange: Exchange) -> None:
        body = shapes.dumps({"error": "Unauthorized"})
        exchange.whole(401, body, [(b"content-type", b"application/json")])

    def _refusal(self, exchange: Exchange) -> Callable[[], None] | None:
        """Return what answers a request that no route takes, as Starlette answers it."""
        request = exchange.request
        if request.method == "OPTIONS":
            answer = preflight(request, self._config.allowed_origins)
            if answer is not None:
                return partial(exchange.whole, *answer)
        if request.websocket and request.path != _REALTIME:
            return partial(websocket.refuse, exchange)
        if (request.path == _REALTIME and request.websocket) or is_admin(request.path):
            return None if not request.path.endswith("/") else partial(self._redirect, exchange)
        route = self._routes.get(request.path)
        if route is None:
            return partial(self._redirect if self._other_slash(request) else self._not_found, exchange)
        if request.method not in route.methods:
            allow = (b"allow", ", ".join(sorted(route.methods)).encode())
            return partial(self._send, exchange, 405, {"detail": "Method Not Allowed"}, [allow])
        return None

    def _other_slash(self, request: Request) -> str:
        path = request.path
        other = path.rstrip("/") if path.endswith("/") else path + "/"
        return other if other in self._routes or (path != other and is_admin(other)) else ""

    def _redirect(self, exchange: Exchange) -> None:
        """Send the client to the path with the other slash, on the host that its Host header names."""
        request = exchange.request
        query = f"?{request.query}" if request.query else ""
        location = f"http://{request.header(b'host')}{quote(self._other_slash(request))}{query}"
        headers = [(b"location", location.encode("latin-1")), *self._common(request)]
        exchange.whole(307, b"", headers)

    def _not_found(self, exchange: Exchange) -> None:
        self._send(exchange, 404, {"detail": "Not Found"}, [])

    # -- answers ---------------------------------------------------------------------------------------

    def _answer(self, exchange: Exchange, params: faults.Params) -> None:
        request = exchange.request
        if request.path == _REALTIME:
            websocket.accept(exchange)
            return
        try:
            self._reply(exchange, params, self._ask(exchange, params))
        except Refusal as refusal:
            self._refuse(exchange, refusal)

    def _ask(self, exchange: Exchange, params: faults.Params) -> Reply:
        request = exchange.request
        route = self._routes.get(request.path, OPERATOR_ROUTE)
        return route.answer(
            Ask(
                body=_read_body(request, route.takes),
                id=request.id,
                now=int(exchange.clock.seconds()),
                config=self._config,
                tokens=params.integer("tokens") if params.all("tokens") else None,
                length=request.length,
            )
        )

    def _reply(self, exchange: Exchange, params: faults.Params, reply: Reply) -> None:
        ttft = params.seconds("ttft", self._config.ttft)
        tpot = params.seconds("tpot", self._config.tpot)
        every = params.seconds("comments", self._config.comment_every)
        if reply.job is not None:
            exchange.start_job(reply.job)
        if isinstance(reply, Stream):
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                *self._common(exchange.request),
            ]
            exchange.begin(200, headers)
            steps = stream.paced(reply.events, ttft, tpot)
            stream.Pump(exchange, stream.with_comments(steps, every), count_events=True).start()
            return
        delay = 0.0 if reply.job is None else ttft + max(0, reply.job.tokens - 1) * tpot
        exchange.later(delay, partial(self._send_whole, exchange, reply))

    def _send_whole(self, exchange: Exchange, reply: Whole) -> None:
        body = reply.content if isinstance(reply.content, bytes) else shapes.dumps(reply.content)
        kind = [(b"content-type", reply.content_type)] if reply.content_type else []
        exchange.whole(reply.status, body, [*reply.headers, *kind, *self._common(exchange.request)])

    def _send(self, exchange: Exchange, status: int, content: Json, headers: list[Header]) -> None:
        kind = (b"content-type", b"application/json")
        exchange.whole(status, shapes.dumps(content), [*headers, kind, *self._common(exchange.request)])

    def _refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        self._send(exchange, refusal.status, refusal.content, [])

    def _common(self, request: Request) -> list[Header]:
        return [*allow_origin(request, self._config.allowed_origins), (b"vary", b"Origin")]


def _bad_directive(reason: faults.BadDirective) -> Refusal:
    return shapes.error(400, "BadRequestError", f"X-Vllmsim: {reason}", "X-Vllmsim")


def _read_body(request: Request, takes: str) -> Json:
    """Return what a route takes of the body, or raise vLLM's refusal of it."""
    kind = request.header(b"content-type").partition(";")[0].strip().lower()
    if takes == "json":
        if kind != "application/json":
            raise shapes.error(400, "Bad Request", _JSON_ONLY)
        if request.length > BODY_LIMIT:
            raise shapes.error(413, "Request Entity Too Large", f"The body is over {BODY_LIMIT} bytes")
        return shapes.parse_json(bytes(request.body))
    if takes == "form" and kind != "multipart/form-data":
        shapes.required({}, "file")
    return {}
