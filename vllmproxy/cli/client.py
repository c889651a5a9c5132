"""Calls of the proxy's API, and every way in which they fail as a sentence."""

import json
import signal
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Final, Self

import httpx
from attrs import frozen

from vllmproxy import __version__
from vllmproxy.cli.errors import CommandError
from vllmproxy.cli.place import KEY_VARIABLES, URL_VARIABLE, Place

#: Bytes of an answer. A page of a hundred keys with large metadata has two million.
MAXIMUM_ANSWER: Final = 64 * 1024 * 1024
_WHERE: Final = f"--url or {URL_VARIABLE}"
_WHOSE: Final = f"--key-file or {KEY_VARIABLES[0]}"


class _DeadlinePassed(Exception):
    """A call took too long as a whole. No ``OSError``: those are httpx's to explain."""


@frozen
class _Answer:
    status: int
    content_type: str
    body: bytes


class Client:
    """Asks one proxy. It follows no redirects and uses no other proxy: the key goes nowhere else."""

    def __init__(self, place: Place) -> None:
        """Raise :class:`CommandError` where the authorities to trust cannot be read."""
        self._place = place
        headers = {"user-agent": f"vllmproxy/{__version__}", "accept-encoding": "identity"}
        if place.key is not None:
            headers["authorization"] = f"Bearer {place.key}"
        transport = httpx.HTTPTransport(verify=_trust(place), uds=place.socket, trust_env=False)
        self._http = httpx.Client(
            base_url=place.url, headers=headers, timeout=place.timeout, transport=transport, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ended: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._http.close()

    def get(self, path: str, query: Mapping[str, str | None]) -> dict[str, Any]:
        """Return the object that ``path`` answers; what is ``None`` is not asked for. Raises :class:`CommandError`."""
        return self._object(self._call("GET", path, query=query))

    def get_csv(self, path: str, query: Mapping[str, str | None]) -> str:
        """Return the CSV text that ``path`` answers. Raises :class:`CommandError`."""
        answer = self._call("GET", path, query=query)
        if answer.status != 200 or not answer.content_type.startswith("text/csv"):
            self._object(answer)
            raise self._is_no_proxy(answer)
        return answer.body.decode("utf-8", "replace")

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send ``body`` and return the object that is answered. Raises :class:`CommandError`."""
        return self._object(self._call("POST", path, body=body))

    def misunderstood(self) -> CommandError:
        """Return the error for an answer that is no such thing as was asked for."""
        return CommandError(f"{self._place.name} does not answer as vllmproxy does; check {_WHERE}.")

    def _call(
        self, method: str, path: str, *, query: Mapping[str, str | None] | None = None, body: Any = None
    ) -> _Answer:
        params = {name: value for name, value in (query or {}).items() if value is not None}
        try:
            with (
                _deadline(self._place.timeout),
                self._http.stream(method, path, params=params, json=body) as response,
            ):
                return _Answer(response.status_code, response.headers.get("content-type", ""), self._read(response))
        except (_DeadlinePassed, httpx.TimeoutException):
            doubt = "" if method == "GET" else " (it may have done it all the same)"
            raise CommandError(
                f"{self._place.name} did not answer within {self._place.timeout:g} s{doubt}; "
                f"see whether it is well, or give it longer with --timeout."
            ) from None
        except httpx.HTTPError as error:
            raise CommandError(_explain(error, self._place.name)) from None

    def _read(self, response: httpx.Response) -> bytes:
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > MAXIMUM_ANSWER:
                raise CommandError(
                    f"{self._place.name} sent more than {MAXIMUM_ANSWER} bytes; ask for less, or check {_WHERE}."
                )
        return bytes(body)

    def _object(self, answer: _Answer) -> dict[str, Any]:
        try:
            value = json.loads(answer.body)
        except (ValueError, RecursionError):
            raise self._is_no_proxy(answer) from None
        if isinstance(value, dict):
            if 200 <= answer.status < 300:
                return value
            error = value.get("error")
            message = error.get("message") if isinstance(error, dict) else None
            if isinstance(message, str) and message:
                raise CommandError(self._refusal(answer.status, message))
        raise self._is_no_proxy(answer)

    def _refusal(self, status: int, message: str) -> str:
        key = self._place.key
        if key is None:
            return f"{message} Give the key with {_WHOSE}." if status == 401 else message
        message = message.replace(key, "...")
        return f"{message} Check the key in {_WHOSE}." if status == 401 else message

    def _is_no_proxy(self, answer: _Answer) -> CommandError:
        return CommandError(
            f"{self._place.name} answers with status {answer.status} and nothing that vllmproxy would say; "
            f"is it the proxy? Check {_WHERE}."
        )


def _trust(place: Place) -> ssl.SSLContext:
    """Return what certificates are judged by. Where there will be none nothing is trusted, which takes no time."""
    if place.url.scheme != "https":
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        return ssl.create_default_context(cafile=place.ca)
    except ssl.SSLError:
        raise CommandError(f"--ca: {place.ca!r} holds no certificate in PEM.") from None
    except OSError as error:
        raise CommandError(f"--ca: cannot read {place.ca!r} ({error.strerror}).") from None


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise :class:`_DeadlinePassed` in the block when it takes longer than ``seconds``, however it spends them:
    httpx's own timeouts begin anew with each byte."""

    def ring(signal_number: int, frame: FrameType | None) -> None:
        raise _DeadlinePassed

    before = signal.signal(signal.SIGALRM, ring)
    # Again each second, should somebody's callback have swallowed it.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _explain(error: httpx.HTTPError, name: str) -> str:
    """Return the sentence for a call that brought no answer."""
    cause = _cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        reason = cause.verify_message.rstrip(".")
        return f"The certificate of {name} is not good ({reason}); name the authority to trust with --ca FILE."
    if isinstance(cause, ssl.SSLError):
        return f"No TLS with {name} came about ({cause.reason}); does it speak https? Check {_WHERE}."
    if isinstance(error, httpx.ConnectError):
        reason = getattr(cause, "strerror", None) or str(error)
        return f"Cannot connect to {name} ({reason}); is the proxy running? Check {_WHERE}."
    if isinstance(error, httpx.ProtocolError):
        return (
            f"{name} does not speak HTTP, or ended its answer early; is it the proxy, and without TLS? Check {_WHERE}."
        )
    return f"The connection to {name} broke; whether the call was done is not known."


def _cause(error: BaseException) -> BaseException:
    """Return the exception at the bottom of ``error``."""
    below = error.__cause__ or error.__context__
    return error if below is None else _cause(below)
