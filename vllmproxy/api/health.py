"""``/health/*``: is the process alive, and can it do its work. Nobody needs a key to ask."""

from klein import Klein
from twisted.web.iweb import IRequest

from vllmproxy.api.errors import answer_json
from vllmproxy.store.interface import Store, StoreUnavailable


class HealthApi:
    """The handlers. They name states, never addresses."""

    def __init__(self, store: Store, version: str) -> None:
        self._store = store
        self._version = version

    def register(self, app: Klein) -> None:
        """Add the routes to ``app``."""
        app.route("/health/liveliness", methods=["GET"], endpoint="liveliness")(self.liveness)
        app.route("/health/liveness", methods=["GET"], endpoint="liveness")(self.liveness)
        app.route("/health/readiness", methods=["GET"])(self.readiness)

    async def liveness(self, request: IRequest) -> bytes:
        """Say that the reactor turns."""
        return answer_json(request, "I'm alive!")

    async def readiness(self, request: IRequest) -> bytes:
        """Answer 200 if keys can be looked up, else 503, and say which."""
        try:
            await self._store.ping()
        except StoreUnavailable:
            return answer_json(request, self._state("unhealthy", "not connected"), 503)
        return answer_json(request, self._state("healthy", "connected"))

    def _state(self, status: str, store: str) -> dict[str, str]:
        return {"status": status, "db": store, "version": self._version}
