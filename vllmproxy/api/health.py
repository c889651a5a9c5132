"""``/health/*``: is the process alive, and can it do its work. Nobody needs a key to ask."""

from collections.abc import Awaitable, Callable

from klein import Klein
from twisted.web.iweb import IRequest

from vllmproxy.api.errors import answer_json
from vllmproxy.store.interface import Store, StoreUnavailable


class HealthApi:
    """The handlers. They name states, never addresses.

    :param is_well: tells whether vLLM answers.
    :param is_stopping: tells whether requests should go elsewhere, because this process is going to end.
    :param workers: tells how many processes are at work, and of how many; ``None`` where there is this one only.
    """

    def __init__(
        self,
        store: Store,
        version: str,
        is_well: Callable[[], Awaitable[bool]],
        is_stopping: Callable[[], bool],
        workers: Callable[[], tuple[int, int]] | None,
    ) -> None:
        self._store = store
        self._version = version
        self._is_well = is_well
        self._is_stopping = is_stopping
        self._workers = workers

    def register(self, app: Klein) -> None:
        """Add the routes to ``app``."""
        app.route("/health/liveliness", methods=["GET"], endpoint="liveliness")(self.liveness)
        app.route("/health/liveness", methods=["GET"], endpoint="liveness")(self.liveness)
        app.route("/health/readiness", methods=["GET"])(self.readiness)

    async def liveness(self, request: IRequest) -> bytes:
        """Say that the reactor turns."""
        return answer_json(request, "I'm alive!")

    async def readiness(self, request: IRequest) -> bytes:
        """Answer 200 if keys can be looked up, vLLM answers and this is not the end, else 503, and say which."""
        upstream = await self._is_well()
        try:
            await self._store.ping()
            store = True
        except StoreUnavailable:
            store = False
        stopping = self._is_stopping()
        state: dict[str, object] = {
            "status": "stopping" if stopping else "healthy" if store and upstream else "unhealthy",
            "db": "connected" if store else "not connected",
            "upstream": "reachable" if upstream else "unreachable",
            "version": self._version,
        }
        if self._workers is not None:
            ready, count = self._workers()
            state["workers"] = {"ready": ready, "of": count}
        return answer_json(request, state, 200 if store and upstream and not stopping else 503)
