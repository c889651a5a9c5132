"""Every refusal and failure that a caller can meet, and the one place that turns them into a body.

The shapes are LiteLLM's ``{"error": {"message", "type", "param", "code"}}`` (``code`` is the status as a
string) and, on Anthropic's routes, ``{"type": "error", "error": {"type", "message"}}``.
"""

import json
from collections.abc import Sequence
from typing import ClassVar

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    422: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


#: When to try again, in seconds: longer than the store's own reconnection takes at best.
_SOON = ((b"retry-after", b"1"),)


class ApiError(Exception):
    """A refusal with everything an HTTP answer needs.

    :ivar status: the HTTP status.
    :ivar type: LiteLLM's ``error.type``.
    :ivar param: LiteLLM's ``error.param``; its own answers carry the *string* ``"None"`` where nothing fits.
    :ivar message: one sentence for the caller: what is wrong and what to do. Never a key, a prompt, an address.
    :ivar headers: extra response header lines: those of its kind (``own_headers``), and those of this one.
    """

    status: int = 400
    type: ClassVar[str] = "bad_request_error"
    default_param: ClassVar[str] = "None"
    own_headers: ClassVar[tuple[tuple[bytes, bytes], ...]] = ()

    def __init__(self, message: str, *, param: str | None = None, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.param = self.default_param if param is None else param
        self.headers = (*self.own_headers, *headers)


class BadRequest(ApiError):
    """The request cannot be understood: a wrong field, a bad value, an unsafe path."""


class AuthError(ApiError):
    """The caller did not show a key that opens the door. A 401 names the scheme it wants (RFC 9110 §11.6.1)."""

    status = 401
    type = "auth_error"
    own_headers = ((b"www-authenticate", b"Bearer"),)


class UnknownKey(AuthError):
    """The credential is not a key of this proxy."""

    type = "token_not_found_in_db"
    default_param = "key"


class ExpiredKey(AuthError):
    """The key's ``duration`` is over."""

    type = "expired_key"


class Forbidden(ApiError):
    """A good key that does not open this door."""

    status = 403
    type = "auth_error"


class NotFound(ApiError):
    """There is nothing by that name."""

    status = 404
    type = "not_found_error"


class MethodNotAllowed(ApiError):
    """The path exists, the method does not."""

    status = 405


class RateLimited(ApiError):
    """The key has used up a limit for now; ``retry-after`` says when there is room again."""

    status = 429
    type = "rate_limit_error"


class BudgetExceeded(ApiError):
    """What is left of the key's budget is less than the request may cost.

    :param status: the operator's choice (``--budget-status``).
    """

    type = "budget_exceeded"

    def __init__(self, message: str, *, status: int, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(message, headers=headers)
        self.status = status


class ModelDenied(ApiError):
    """The key does not open this model, or the request does not say plainly which one it is for."""

    status = 403
    type = "key_model_access_denied"
    default_param = "model"


class TooLarge(ApiError):
    """The body has to be read before it is forwarded, and is longer than may be held."""

    status = 413


class StoreDown(ApiError):
    """The store does not answer just now; nobody is let in and nobody is called a stranger."""

    status = 503
    type = "no_db_connection"
    own_headers = _SOON


class Overloaded(ApiError):
    """The proxy has as much under way as it may; ``retry-after`` says when to try again. Nothing was forwarded."""

    status = 503
    type = "overloaded_error"
    own_headers = _SOON


class UpstreamUnreachable(ApiError):
    """No connection to vLLM could be made."""

    status = 503
    type = "upstream_unreachable"


class UpstreamFailed(ApiError):
    """vLLM gave no usable answer, or could not be asked; it may have taken the request."""

    status = 502
    type = "upstream_error"


class UpstreamTimeout(ApiError):
    """vLLM took the request and did not begin to answer in time."""

    status = 504
    type = "timeout_error"


class Internal(ApiError):
    """A fault of the proxy itself; the log has the traceback, the caller gets this sentence."""

    status = 500
    type = "internal_server_error"


def error_body(status: int, type: str, param: str, message: str, *, anthropic: bool) -> bytes:
    """Return the JSON body of an error answer, in LiteLLM's shape or in Anthropic's."""
    if anthropic:
        inner = {"type": _ANTHROPIC_TYPES.get(status, "api_error"), "message": message}
        return json.dumps({"type": "error", "error": inner}).encode()
    error = {"message": message, "type": type, "param": param, "code": str(status)}
    return json.dumps({"error": error}).encode()


def body_of(error: ApiError, *, anthropic: bool = False) -> bytes:
    """Return the JSON body for ``error``."""
    return error_body(error.status, error.type, error.param, error.message, anthropic=anthropic)
