"""The record of a finished request, and what takes it."""

from typing import Literal, Protocol

from attrs import define

from vllmproxy.usage.tokens import Usage

#: Why a request ended: the answer passed whole; the client closed or reset first; vLLM failed before or in
#: the middle of its answer; the proxy itself answered (401, 403, 400 …), or cut it off (``error`` says why).
Ended = Literal["done", "client_gone", "upstream_failed", "refused"]


@define(slots=True, kw_only=True)
class RequestRecord:
    """What is known of one request when it is over. No credential, no prompt, no query string.

    :ivar time: when the request's head was complete, seconds since the epoch.
    :ivar request_id: the id that vLLM and the client saw.
    :ivar key_id: sha256 hex of the virtual key, ``"master"``, or ``None`` where nobody was identified.
    :ivar end_user: what the caller named as its own user, if anything.
    :ivar client: the client's address as text, after ``--trusted-proxy`` was applied.
    :ivar route: the path as vLLM knows it, else as it was forwarded or asked for, without the query.
    :ivar status: the status sent to the client, 0 where none was.
    :ivar bytes_in: request body bytes taken from the client.
    :ivar bytes_out: response body bytes given to the client.
    :ivar time_to_first_byte: seconds from head complete to the first byte of the answer's body (vLLM sends the head
        of a stream before its first token).
    :ivar streamed: whether the answer was an event stream, ``None`` where there was none.
    :ivar tokens_estimated: ``True`` where the counts were not reported but counted from events.
    :ivar duration: seconds from head complete to the end.
    """

    time: float
    request_id: str
    method: str
    route: str
    client: str = ""
    key_id: str | None = None
    key_alias: str | None = None
    end_user: str | None = None
    model: str | None = None
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    time_to_first_byte: float | None = None
    streamed: bool | None = None
    duration: float = 0.0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    tokens_estimated: bool | None = None
    ended: Ended = "done"
    error: str | None = None

    def tell(self, usage: Usage | None) -> None:
        """Take over what an answer told of its tokens, if it did."""
        if usage is not None:
            self.prompt_tokens = usage.prompt_tokens
            self.completion_tokens = usage.completion_tokens
            self.total_tokens = usage.total_tokens
            self.tokens_estimated = True if usage.source == "counted" else None


class Observer(Protocol):
    """Takes finished requests. It is called in the reactor's thread and must neither block nor raise."""

    def started(self) -> None:
        """A request's head is complete: one more in flight."""

    def finished(self, record: RequestRecord) -> None:
        """A request that was ``started`` is over."""
