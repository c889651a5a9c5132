"""CORS as Starlette's ``CORSMiddleware`` answers for vLLM: methods and headers are open, origins are not."""

from collections.abc import Sequence

from vllmproxy.simulator.exchange import Header
from vllmproxy.simulator.request import Request

_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY")
_VARY = b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers, Access-Control-Request-Private-Network"


def allow_origin(request: Request, origins: Sequence[str]) -> list[Header]:
    """Return the header that lets a page of the request's origin read the answer, if it may."""
    origin = request.header(b"origin")
    if not origin or not ("*" in origins or origin in origins):
        return []
    value = "*" if "*" in origins else origin
    return [(b"access-control-allow-origin", value.encode("latin-1"))]


def preflight(request: Request, origins: Sequence[str]) -> tuple[int, bytes, list[Header]] | None:
    """Return status, body and headers for a preflight; ``None`` if the OPTIONS request is not one."""
    wanted = request.header(b"access-control-request-method")
    if not wanted or not request.header(b"origin"):
        return None
    allowed = allow_origin(request, origins)
    headers: list[Header] = [
        (b"vary", _VARY),
        (b"access-control-allow-methods", ", ".join(_METHODS).encode()),
        (b"access-control-max-age", b"600"),
        *allowed,
    ]
    asked = request.header(b"access-control-request-headers")
    if asked:
        headers.append((b"access-control-allow-headers", asked.encode("latin-1")))
    headers.append((b"content-type", b"text/plain; charset=utf-8"))
    failures = [] if allowed else ["origin"]
    if wanted not in _METHODS:
        failures.append("method")
    if failures:
        return 400, f"Disallowed CORS {', '.join(failures)}".encode(), headers
    return 200, b"OK", headers
