"""Who sent an API request."""

from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred
from twisted.web.iweb import IRequest
from zope.interface import Interface

from vllmproxy import exposure
from vllmproxy.errors import Forbidden
from vllmproxy.keys.credentials import CREDENTIAL_HEADERS, read_credential
from vllmproxy.keys.gate import Caller, Gate
from vllmproxy.relay.headers import FORWARDED

_NOT_ALLOWED = "Virtual key is not allowed to call this route."


class ICaller(Interface):
    """The component of a request that says who sent it, once that is known."""


async def caller_of(gate: Gate, request: IRequest) -> Caller:
    """Return who sent ``request``, and note it there; raises what :meth:`Gate.identify` raises."""
    headers = request.requestHeaders
    fields = {name: [*headers.getRawHeaders(name, ())] for name in CREDENTIAL_HEADERS}
    found = gate.identify(read_credential(fields))
    caller = await found if isinstance(found, Deferred) else found
    request.setComponent(ICaller, caller)  # type: ignore[attr-defined]  # every twisted.web.server.Request has them
    return caller


async def holder_of(gate: Gate, request: IRequest) -> Caller:
    """Return who sent ``request``; raise :class:`Forbidden` while authentication is off."""
    caller = await caller_of(gate, request)
    if caller.key_id is None:
        raise Forbidden("Keys need a master key: start with --master-key-file and use the master key.")
    return caller


async def reader_of(gate: Gate, request: IRequest, endpoint: str) -> Caller:
    """Return the caller if it may use ``endpoint`` (``/key/info``) about itself, else raise :class:`Forbidden`."""
    caller = await holder_of(gate, request)
    if caller.key is not None and not caller.key.policy.may_read(endpoint):
        raise Forbidden(f"{_NOT_ALLOWED} Its key_type or its allowed_routes leave this one out.")
    return caller


async def manager_of(gate: Gate, request: IRequest, endpoint: str) -> Caller:
    """Return the caller if it may use ``endpoint`` about any key, else raise :class:`Forbidden`."""
    caller = await holder_of(gate, request)
    if not manages(caller, endpoint):
        raise Forbidden(f"{_NOT_ALLOWED} Only the master key and keys of the type management manage keys.")
    return caller


async def master_of(gate: Gate, request: IRequest) -> Caller:
    """Return the caller if it is the master key, else raise :class:`Forbidden`."""
    caller = await holder_of(gate, request)
    if not caller.is_master:
        raise Forbidden(f"{_NOT_ALLOWED} It is for the master key.")
    return caller


def manages(caller: Caller, endpoint: str) -> bool:
    """Tell whether ``caller`` may use ``endpoint`` about any key."""
    return caller.is_master or (caller.key is not None and caller.key.policy.may_manage(endpoint))


def is_local(request: IRequest) -> bool:
    """Tell whether ``request`` comes from this very machine over loopback, and not through another proxy: any of the
    forwarding headers would say so, and behind a UNIX socket there is one as a rule."""
    if any(request.requestHeaders.hasHeader(name) for name in FORWARDED):
        return False
    peer = request.getClientAddress()
    return not isinstance(peer, UNIXAddress) and exposure.is_local(peer)
