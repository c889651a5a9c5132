"""The branch of the resource tree beside ``/vllm``: buffered ``twisted.web`` requests, for Klein."""

from typing import Any, Final

from attrs import define
from twisted.internet.interfaces import IReactorTime
from twisted.web.server import Site

from vllmproxy.api.caller import ICaller
from vllmproxy.errors import ApiError, Overloaded
from vllmproxy.http1.message import WireError
from vllmproxy.http1.stream import Stream
from vllmproxy.http1.web import WebExchange
from vllmproxy.ids import fresh_id
from vllmproxy.keys.credentials import read_credential
from vllmproxy.keys.gate import Gate
from vllmproxy.observers.record import Ended, Observer, RequestRecord
from vllmproxy.relay.headers import TrustedProxies, request_id_in
from vllmproxy.relay.refuse import refuse, refuse_body

#: What every route that takes a body begins with; all of them need a key.
_TAKES_BODIES: Final = b"/key/"


@define(eq=False)
class ApiBranch:
    """Hands requests to the API's site and reports them.

    :ivar routes: the paths that a record may name. Any other may hold a key (``/key/sk-.../regenerate``).
    :ivar max_body: bytes of a request's body.
    :ivar max_held: bytes of all such bodies together; ``held``: those that are held just now.
    :ivar is_ending: what is under way is being reset, because the process ends.
    """

    clock: IReactorTime
    gate: Gate
    site: Site
    routes: frozenset[str]
    observer: Observer
    trusted: TrustedProxies
    max_body: int
    max_held: int
    held: int = 0
    is_ending: bool = False

    def handle(self, stream: Stream) -> None:
        """Take a request whose head is complete."""
        _ApiRequest(self, stream).begin()


class _ApiRequest:
    """One request to the API, from its head to its record."""

    def __init__(self, branch: ApiBranch, stream: Stream) -> None:
        self._branch = branch
        self._stream = stream
        self._began = branch.clock.seconds()
        self._id = request_id_in(stream.head.fields) or fresh_id()
        self._held = 0

    def begin(self) -> None:
        branch = self._branch
        branch.observer.started()
        try:
            self._check_head()
        except ApiError as error:
            self._give_up(error)
            return
        WebExchange(
            self._stream,
            branch.site,
            limit=branch.max_body,
            hold=self._hold,
            refuse=self._refuse,
            id=self._id,
            done=self._done,
        ).begin()

    def _check_head(self) -> None:
        """Refuse a body that comes without a key before any of it is read. Whose key it is, is asked later."""
        head = self._stream.head
        if head.has_body and head.target.startswith(_TAKES_BODIES):
            credential = read_credential(head.fields)
            if credential.state != "present":
                self._branch.gate.identify(credential)

    def _hold(self, size: int) -> bool:
        branch = self._branch
        if branch.held + size > branch.max_held:
            self._give_up(Overloaded("Too many bodies are held just now. Try again in a moment."))
            return False
        branch.held += size
        self._held += size
        return True

    def _give_up(self, error: ApiError) -> None:
        refuse(self._stream, error, self._id)
        self._done(None)

    def _refuse(self, stream: Stream, error: WireError) -> None:
        refuse_body(stream, error, self._id)
        self._done(None)

    def _done(self, request: Any) -> None:
        branch, stream = self._branch, self._stream
        branch.held -= self._held
        stream.receiver = None  # or they would hold each other until somebody looks for garbage
        caller = None if request is None else request.getComponent(ICaller)
        was_cut = branch.is_ending and not stream.status
        path = stream.head.target.partition(b"?")[0].decode("ascii")
        branch.observer.finished(
            RequestRecord(
                time=self._began,
                request_id=self._id.decode("ascii"),
                method=stream.head.method.decode("ascii"),
                route=path if path in branch.routes else "other",
                client=branch.trusted.client(getattr(stream.peer, "host", ""), stream.head).address,
                key_id=caller.key_id if caller else None,
                key_alias=caller.key_alias if caller else None,
                status=stream.status,
                bytes_in=stream.bytes_in,
                bytes_out=stream.bytes_out,
                duration=branch.clock.seconds() - self._began,
                ended="refused" if was_cut else _ended(stream.status),
                error="stopping" if was_cut else None,
            )
        )


def _ended(status: int) -> Ended:
    """Say how an API request with this status ended; 0 is none, because the client left first."""
    if status == 0:
        return "client_gone"
    return "refused" if status >= 400 else "done"
