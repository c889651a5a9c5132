"""The API over a real socket, with Twisted's own server in front of it."""

import json
from collections.abc import Callable
from typing import Any

from attrs import frozen
from treq.client import HTTPClient
from twisted.internet import reactor
from twisted.internet.defer import Deferred, fail
from twisted.internet.task import Clock
from twisted.web.client import Agent
from twisted.web.http_headers import Headers
from twisted.web.iweb import IResponse

from vllmproxy.api.app import Api
from vllmproxy.api.metrics import MetricsText
from vllmproxy.keys.cache import KeyCache
from vllmproxy.keys.gate import Gate
from vllmproxy.keys.key import VirtualKey
from vllmproxy.keys.masterkey import MasterKey
from vllmproxy.store.memory import MemoryStore

MASTER = "sk-canary-of-the-master-key"
CUSTOM = "sk-canary-of-a-custom-key"
NOW = 1_700_000_000.0


@frozen
class Answer:
    status: int
    headers: Headers
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, str]:
        error: dict[str, str] = self.json["error"]
        assert error["code"] == str(self.status)
        assert set(error) == {"message", "type", "param", "code"}
        return error


class FragileStore(MemoryStore):
    """A memory store that can be made to fail."""

    fault: Exception | None = None

    def get_key(self, token: str) -> Deferred[VirtualKey | None]:
        return super().get_key(token) if self.fault is None else fail(self.fault)

    async def ping(self) -> None:
        if self.fault is not None:
            raise self.fault
        await super().ping()


class House:
    def __init__(
        self,
        store: Any = None,
        *,
        auth: bool = True,
        open_metrics: bool = False,
        metrics_text: MetricsText = lambda: (b"text/plain; version=0.0.4", b"numbers 1\n"),
        workers: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self.clock = Clock()
        self.clock.advance(NOW)
        self.store = store or FragileStore()
        self.vllm_is_well = True
        cache = KeyCache(self.clock, ttl=60.0)
        self.gate = Gate(self.store, cache, MasterKey(MASTER) if auth else None, self.clock)
        self.store.watch_keys(self.gate.changed)
        self.api = Api(
            self.gate,
            self.store,
            self.clock,
            metrics_text=metrics_text,
            open_metrics=open_metrics,
            version="1.2.3",
            is_well=self.is_well,
            workers=workers,
        )
        self.client = HTTPClient(Agent(reactor))

    async def is_well(self) -> bool:
        return self.vllm_is_well

    async def open(self) -> None:
        await self.store.open()
        self.port = reactor.listenTCP(0, self.api.site(), interface="127.0.0.1")

    async def close(self) -> None:
        await self.port.stopListening()

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        key: str | None = MASTER,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        sent = {**({"Authorization": f"Bearer {key}"} if key is not None else {}), **(headers or {})}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        response: IResponse = await self.client.request(
            method,
            f"http://127.0.0.1:{self.port.getHost().port}{path}",
            headers=sent,
            data=data,
            timeout=20,
            unbuffered=True,
        )
        return Answer(response.code, response.headers, await response.content())  # type: ignore[attr-defined]

    async def make(self, **fields: Any) -> dict[str, Any]:
        answer = await self.ask("POST", "/key/generate", fields)
        assert answer.status == 200, answer.body
        made: dict[str, Any] = answer.json
        return made
