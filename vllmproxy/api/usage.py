"""``GET /usage`` and ``GET /key/{key}/usage``: what was used, summed up."""

import json
from collections.abc import Callable, Sequence
from typing import Final

from attrs import evolve
from klein import Klein
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.web.iweb import IRequest

from vllmproxy.api.caller import manages, reader_of
from vllmproxy.api.errors import answer
from vllmproxy.api.management import KEY_NOT_FOUND
from vllmproxy.api.queries import UsageRequest, parse_usage
from vllmproxy.api.usagerows import Aliases, csv_head, csv_row, json_row, total_of
from vllmproxy.errors import BadRequest, Forbidden, NotFound
from vllmproxy.keys.gate import Caller, Gate
from vllmproxy.store.interface import Store
from vllmproxy.usage.ledger import MOST_GROUPS, TooManySums
from vllmproxy.usage.sums import UsageQuery, UsageSum

_CSV: Final = b"text/csv; charset=utf-8"
#: Rows that are written at a stretch, during which nobody else is served: a few milliseconds.
_STRETCH: Final = 500


class UsageApi:
    """The handlers. A key that manages keys sees the use of all of them, any other one its own."""

    def __init__(self, gate: Gate, store: Store, clock: IReactorTime) -> None:
        self._gate = gate
        self._store = store
        self._clock = clock

    def register(self, app: Klein) -> None:
        """Add the routes to ``app``."""
        app.route("/usage", methods=["GET"])(self.usage)
        app.route("/key/<key>/usage", methods=["GET"], endpoint="key_usage")(self.usage)

    async def usage(self, request: IRequest, key: str | None = None) -> bytes:
        """Show the sums that are asked for, as JSON or CSV; with ``key`` in the path those of one key."""
        caller = await reader_of(self._gate, request, "/usage")
        accept = ",".join(request.requestHeaders.getRawHeaders("accept", ()))
        wanted = parse_usage(request.uri, self._clock.seconds(), accept, key)
        query = evolve(wanted.query, key=await self._key_to_show(caller, wanted))
        try:
            sums = await self._store.read_usage(query)
        except TooManySums:
            message = f"These are more than {MOST_GROUPS} sums: ask for fewer days, or group by less."
            raise BadRequest(message, param="group_by") from None
        aliases = await self._aliases(query, sums)
        if wanted.csv:
            rows = await self._written(sums, lambda each: csv_row(query.group_by, each, aliases))
            return answer(request, _CSV, "".join([csv_head(query.group_by), *rows]).encode("utf-8", "replace"))
        rows = await self._written(sums, lambda each: json.dumps(json_row(query.group_by, each, aliases)))
        head = json.dumps({"since": query.since, "until": query.until, "group_by": query.group_by})
        total = json.dumps(json_row((), total_of(sums), {}))
        body = f'{head[:-1]}, "usage": [{", ".join(rows)}], "total": {total}}}'
        return answer(request, b"application/json", body.encode())

    async def _key_to_show(self, caller: Caller, wanted: UsageRequest) -> str | None:
        """Return the id of the key whose use is shown, ``None``: all. Raises :class:`Forbidden`, :class:`NotFound`."""
        if manages(caller, "/usage"):
            if wanted.key_alias is None:
                return wanted.query.key
            token = (await self._store.find_aliases([wanted.key_alias])).get(wanted.key_alias)
            if token is None:
                raise NotFound(f"{KEY_NOT_FOUND}.", param="key_alias")
            return token
        if wanted.query.key not in (None, caller.key_id) or wanted.key_alias not in (None, caller.key_alias):
            raise Forbidden("You are not allowed to access this key's usage: a virtual key may only see its own.")
        return caller.key_id

    async def _aliases(self, query: UsageQuery, sums: Sequence[UsageSum]) -> Aliases:
        if "key" not in query.group_by:
            return {}
        place = query.group_by.index("key")
        keys = [await self._store.get_key(token) for token in {each.group[place] for each in sums}]
        return {key.token: key.key_alias for key in keys if key is not None}

    async def _written(self, sums: Sequence[UsageSum], write: Callable[[UsageSum], str]) -> list[str]:
        """Return what ``write`` makes of each, with pauses in which others are served."""
        rows: list[str] = []
        for start in range(0, len(sums), _STRETCH):
            if start:
                await deferLater(self._clock, 0)
            rows += map(write, sums[start : start + _STRETCH])
        return rows
