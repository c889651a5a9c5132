"""``GET /audit``: who managed which keys, newest first. For the master key."""

from klein import Klein
from twisted.web.iweb import IRequest

from vllmproxy.api.caller import master_of
from vllmproxy.api.errors import answer_json
from vllmproxy.api.queries import parse_audit
from vllmproxy.keys.gate import Gate
from vllmproxy.store.interface import Store


class AuditApi:
    """The handler."""

    def __init__(self, gate: Gate, store: Store) -> None:
        self._gate = gate
        self._store = store

    def register(self, app: Klein) -> None:
        """Add the route to ``app``."""
        app.route("/audit", methods=["GET"])(self.audit)

    async def audit(self, request: IRequest) -> bytes:
        """Show at most ``limit`` entries that are older than ``before``, and what to ask for next."""
        await master_of(self._gate, request)
        limit, before = parse_audit(request.uri)
        entries = await self._store.list_audit(limit, before)
        shown = [{"id": entry.id, **entry.fields} for entry in entries]
        return answer_json(request, {"entries": shown, "next": entries[-1].id if len(entries) == limit else None})
