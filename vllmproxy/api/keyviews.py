"""``GET /key/info``, ``/key/list``, ``/key/aliases`` and ``POST /key/health``: what shows keys."""

from typing import Any

from attrs import evolve
from klein import Klein
from twisted.internet.interfaces import IReactorTime
from twisted.web.iweb import IRequest

from vllmproxy.api.caller import manages, reader_of
from vllmproxy.api.errors import answer_json
from vllmproxy.api.fields import row_of, token_of
from vllmproxy.api.management import KEY_NOT_FOUND
from vllmproxy.api.queries import pages_of, parse_aliases, parse_list, query_values
from vllmproxy.errors import Forbidden, NotFound
from vllmproxy.keys.gate import Caller, Gate
from vllmproxy.keys.key import VirtualKey
from vllmproxy.store.interface import Store
from vllmproxy.store.listing import KeyPage, KeyQuery


class KeyViewApi:
    """The handlers. A key that manages keys sees all of them, any other one itself."""

    def __init__(self, gate: Gate, store: Store, clock: IReactorTime) -> None:
        self._gate = gate
        self._store = store
        self._clock = clock

    def register(self, app: Klein) -> None:
        """Add the routes to ``app``."""
        app.route("/key/info", methods=["GET"])(self.info)
        app.route("/key/list", methods=["GET"])(self.list)
        app.route("/key/aliases", methods=["GET"])(self.aliases)
        app.route("/key/health", methods=["POST"], endpoint="key_health")(self.health)

    async def info(self, request: IRequest) -> bytes:
        """Show a key's row."""
        caller = await reader_of(self._gate, request, "/key/info")
        asked = query_values(request.uri, {"key"}).get("key")
        token = _token_to_show(caller, asked)
        row = await self._store.get_key(token)
        if row is None:
            raise NotFound(f"{KEY_NOT_FOUND}.", param="key")
        return answer_json(request, {"key": asked or token, "info": await self._row(row)})

    async def list(self, request: IRequest) -> bytes:
        """Show a page of the keys' ids, or of their rows."""
        caller = await reader_of(self._gate, request, "/key/list")
        query, full = parse_list(request.uri, self._clock.seconds())
        page = await self._page(caller, "/key/list", query)
        keys: Any = [key.token for key in page.keys]
        if full:
            keys = [{"token": key.token, **await self._row(key)} for key in page.keys]
        return answer_json(request, {"keys": keys, **pages_of(query, page.total)})

    async def aliases(self, request: IRequest) -> bytes:
        """Show a page of the aliases, in order."""
        caller = await reader_of(self._gate, request, "/key/aliases")
        query = parse_aliases(request.uri)
        page = await self._page(caller, "/key/aliases", query)
        aliases = [key.key_alias for key in page.keys]
        return answer_json(request, {"aliases": aliases, **pages_of(query, page.total), "size": query.limit})

    async def health(self, request: IRequest) -> bytes:
        """Say that the caller's key works, which it does where this is answered. There are no callbacks for a key."""
        await reader_of(self._gate, request, "/key/health")
        return answer_json(request, {"key": "healthy", "logging_callbacks": None})

    async def _page(self, caller: Caller, endpoint: str, query: KeyQuery) -> KeyPage:
        if not manages(caller, endpoint):
            if query.token not in (None, caller.key_id):
                return KeyPage((), 0)
            query = evolve(query, token=caller.key_id)
        return await self._store.list_keys(query)

    async def _row(self, key: VirtualKey) -> dict[str, Any]:
        return row_of(key, self._clock.seconds(), await self._store.read_account(key.token))


def _token_to_show(caller: Caller, asked: str | None) -> str:
    """Return the id of the key that ``caller`` may see. Raises :class:`NotFound`, :class:`Forbidden`."""
    token = caller.key_id if asked is None else token_of(asked)
    if token is None or (caller.is_master and asked is None):
        raise NotFound(f"{KEY_NOT_FOUND}: the master key has no row; ask for one with ?key=.", param="key")
    if token != caller.key_id and not manages(caller, "/key/info"):
        raise Forbidden("You are not allowed to access this key's info: a virtual key may only see its own.")
    return token
