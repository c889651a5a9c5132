"""What the caller is told when vLLM gave no answer."""

from twisted.logger import Logger
from twisted.python.failure import Failure

from vllmproxy.errors import ApiError, UpstreamFailed, UpstreamTimeout, UpstreamUnreachable
from vllmproxy.http1.agent import ConnectFailed, SetUpFailed
from vllmproxy.http1.answer import AnswerLost, UpstreamStalled
from vllmproxy.http1.message import BadAnswer

_log = Logger(namespace=__name__)


def error_of(reason: Failure) -> ApiError:
    """Return what the caller is told when vLLM gave no answer: never an address, never a traceback."""
    error = reason.value
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SetUpFailed):
        return UpstreamFailed("A connection to vLLM could not be set up. Nothing was sent; the proxy's log says why.")
    if isinstance(error, ConnectFailed):
        return UpstreamUnreachable("vLLM cannot be reached just now. Nothing was sent; try again.")
    if isinstance(error, BadAnswer):
        _log.warn("vLLM's answer was refused: {error}", error=str(error))
        return UpstreamFailed("vLLM's answer was not valid HTTP.")
    if isinstance(error, UpstreamStalled):
        return UpstreamTimeout("vLLM did not take the request in time.")
    if isinstance(error, AnswerLost):
        return UpstreamFailed("vLLM closed the connection before it answered. It may have done the work.")
    _log.failure("Sending a request failed", reason)
    return UpstreamFailed("The request could not be sent to vLLM. The proxy's log says why.")
