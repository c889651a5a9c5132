"""The one map from exceptions to HTTP answers, for everything that Klein serves."""

import json
from typing import Any

from twisted.internet.defer import CancelledError
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.iweb import IRequest
from werkzeug.exceptions import HTTPException

from vllmproxy.errors import ApiError, BadRequest, Internal, MethodNotAllowed, NotFound, body_of
from vllmproxy.keys.gate import store_down
from vllmproxy.keys.routes import KNOWN_ROUTES
from vllmproxy.store.interface import StoreUnavailable

_log = Logger(namespace=__name__)


def error_of(failure: Failure, path: bytes = b"") -> ApiError:
    """Return the refusal that ``failure`` is to its caller. What is nobody's fault but ours is logged.

    :param path: what was asked for.
    """
    error = failure.value
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StoreUnavailable):
        return store_down()
    if isinstance(error, HTTPException):
        return _routing_error(error, path)
    if not isinstance(error, CancelledError):
        # A cancelled handler is a client that hung up or a process that stops, not a fault.
        _log.failure("Unexpected error while answering an API request", failure)
    return Internal("Something went wrong in the proxy. Its log says more.")


def _routing_error(error: HTTPException, path: bytes) -> ApiError:
    if error.code == 404:
        return NotFound(f"There is nothing here. vLLM's own API is below /vllm/.{_meant(path)}")
    if error.code == 405:
        methods = ", ".join(sorted(getattr(error, "valid_methods", None) or ()))
        return MethodNotAllowed(f"Use one of: {methods}.", headers=[(b"allow", methods.encode())])
    return BadRequest("The request cannot be understood.")


def _meant(path: bytes) -> str:
    """Return where the route of vLLM's is that ``path`` names, with or without its ``/v1``; empty where it is none."""
    for route in (path, b"/v1" + path):
        if route in KNOWN_ROUTES:
            name = f"/vllm{route.decode()}"
            if not route.startswith(b"/v1/"):
                return f" It is {name}."
            base = "/vllm" if route.startswith(b"/v1/messages") else "/vllm/v1"  # Anthropic's SDK adds /v1 itself
            return f" It is {name}; an SDK's base_url ends in {base}."
    return ""


def answer_json(request: IRequest, value: Any, status: int = 200) -> bytes:
    """Set the head of a JSON answer and return its body."""
    return answer(request, b"application/json", json.dumps(value).encode(), status)


def answer_error(request: IRequest, error: ApiError) -> bytes:
    """Set the head of an error answer and return its body."""
    for name, value in error.headers:
        request.responseHeaders.setRawHeaders(name, [value])
    return answer(request, b"application/json", body_of(error), error.status)


def answer(request: IRequest, content_type: bytes, body: bytes, status: int = 200) -> bytes:
    """Set the head of an answer, which no cache may keep, and return ``body``."""
    request.setResponseCode(status)
    headers = request.responseHeaders
    headers.setRawHeaders(b"content-type", [content_type])
    headers.setRawHeaders(b"content-length", [b"%d" % len(body)])
    headers.setRawHeaders(b"cache-control", [b"no-store"])
    return body
