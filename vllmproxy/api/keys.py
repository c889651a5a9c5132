"""``/key/generate``, ``/key/info`` and ``/key/delete``, as LiteLLM's users know them."""

import secrets
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs

from klein import Klein
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.iweb import IRequest

from vllmproxy.api.caller import holder_of, manager_of
from vllmproxy.api.errors import answer_json
from vllmproxy.api.fields import new_key, parse_delete, parse_generate, parse_object, row_of, token_of
from vllmproxy.errors import BadRequest, Forbidden, NotFound
from vllmproxy.keys.gate import Caller, Gate
from vllmproxy.keys.key import VirtualKey
from vllmproxy.store.interface import AliasTaken, Store, TokenTaken

_log = Logger()
_NOT_FOUND = "Key not found in database"


class KeyApi:
    """The handlers; ``clock.seconds()`` is the time of day, seconds since the epoch."""

    def __init__(self, gate: Gate, store: Store, clock: IReactorTime) -> None:
        self._gate = gate
        self._store = store
        self._clock = clock

    def register(self, app: Klein) -> None:
        """Add the routes to ``app``."""
        app.route("/key/generate", methods=["POST"])(self.generate)
        app.route("/key/info", methods=["GET"])(self.info)
        app.route("/key/delete", methods=["POST"])(self.delete)

    async def generate(self, request: IRequest) -> bytes:
        """Make a key, and show it this once."""
        manager = await manager_of(self._gate, request)
        now = self._clock.seconds()
        wanted = parse_generate(_object_of(request), now)
        key = wanted.key or f"sk-{secrets.token_urlsafe(32)}"
        row = new_key(wanted, key, now, manager.key_id)
        await self._add(row)
        _log.info("Key {key_id} ({key_alias}) was made", key_id=row.token, key_alias=row.key_alias)
        shown = {"key": key, "token": row.token, "token_id": row.token, "duration": wanted.duration}
        return answer_json(request, {**shown, **row_of(row)})

    async def info(self, request: IRequest) -> bytes:
        """Show a key's row: any to the master key, its own to a virtual key."""
        caller = await holder_of(self._gate, request)
        asked = _query_value(request, "key")
        token = _token_to_show(caller, asked)
        row = await self._store.get_key(token)
        if row is None:
            raise NotFound(f"{_NOT_FOUND}.", param="key")
        return answer_json(request, {"key": asked or token, "info": row_of(row)})

    async def delete(self, request: IRequest) -> bytes:
        """Delete keys by themselves, their hashes or their aliases, and answer with those names.

        Names of nothing are answered in ``not_found`` (ours), or with 404 when nothing at all was deleted.
        """
        await manager_of(self._gate, request)
        wanted = parse_delete(_object_of(request))
        tokens = {key: token_of(key) for key in wanted.keys}
        if wanted.aliases:
            tokens |= await self._store.find_aliases(wanted.aliases)
        deleted = await self._delete(sorted(set(tokens.values())))
        names = (*wanted.keys, *wanted.aliases)
        gone = [name for name in names if tokens.get(name) in deleted]
        if not gone:
            raise NotFound(f"{_NOT_FOUND}: nothing was deleted.", param="keys" if wanted.keys else "key_aliases")
        answer: dict[str, Any] = {"deleted_keys": gone}
        if len(gone) < len(names):
            answer["not_found"] = [name for name in names if tokens.get(name) not in deleted]
        return answer_json(request, answer)

    async def _add(self, row: VirtualKey) -> None:
        taken = BadRequest("That key exists already; leave key out to have a fresh one made.", param="key")
        if self._gate.is_master_token(row.token):
            raise taken
        try:
            await self._store.add_key(row)
        except TokenTaken:
            raise taken from None
        except AliasTaken:
            message = f"Key alias {row.key_alias!r} is taken by another key; aliases are unique."
            raise BadRequest(message, param="key_alias") from None
        self._gate.invalidate(row.token)

    async def _delete(self, tokens: Sequence[str]) -> set[str]:
        try:
            deleted = await self._store.delete_keys(tokens)
        finally:
            # Also when the store did not answer in time: it may have deleted them all the same.
            for token in tokens:
                self._gate.invalidate(token)
        for token in deleted:
            _log.info("Key {key_id} was deleted", key_id=token)
        return set(deleted)


def _object_of(request: IRequest) -> dict[str, Any]:
    request.content.seek(0)
    return parse_object(request.content.read())


def _query_value(request: IRequest, name: str) -> str | None:
    query = request.uri.partition(b"?")[2].decode("latin-1")
    try:
        values = parse_qs(query, max_num_fields=16, errors="strict").get(name, [])
    except ValueError:
        raise BadRequest("The query cannot be read.", param=name) from None
    if len(values) > 1:
        raise BadRequest(f"Give {name} once.", param=name)
    return values[0] if values else None


def _token_to_show(caller: Caller, asked: str | None) -> str:
    """Return the id of the key that ``caller`` may see. Raises :class:`NotFound`, :class:`Forbidden`."""
    token = caller.key_id if asked is None else token_of(asked)
    if token is None or (caller.is_master and asked is None):
        raise NotFound(f"{_NOT_FOUND}: the master key has no row; ask for one with ?key=.", param="key")
    if not caller.is_master and token != caller.key_id:
        raise Forbidden("You are not allowed to access this key's info: a virtual key may only see its own.")
    return token
