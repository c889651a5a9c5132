"""Plain HTTP questions to real processes, and waiting for what they show a moment later."""

import http.client
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

from _service import MASTER_KEY, Twistd
from attrs import frozen

T = TypeVar("T")
CHAT = {"model": "qwen2.5-7b-instruct", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@frozen
class Reply:
    """One whole answer; ``headers`` have lower-case names."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """The ``error`` of an error body."""
        return self.json()["error"]


def bearer(key: str) -> dict[str, str]:
    """The header that shows ``key``."""
    return {"Authorization": f"Bearer {key}"}


def ask(
    service: Twistd,
    method: str,
    path: str,
    body: object = None,
    *,
    key: str | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """Ask on a connection of its own; a ``body`` that is not ``bytes`` is sent as JSON."""
    sent = {**(bearer(key) if key else {}), **(headers or {})}
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    if body is not None:
        sent.setdefault("Content-Type", "application/json")
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    try:
        connection.request(method, path, body, sent)
        answer = connection.getresponse()
        return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def make_key(service: Twistd, **fields: object) -> dict[str, Any]:
    """Make a virtual key and return the answer, the key in it."""
    reply = ask(service, "POST", "/key/generate", fields, key=MASTER_KEY)
    assert reply.status == 200, reply.body
    made: dict[str, Any] = reply.json()
    return made


def until(what: Callable[[], T], seconds: float = 30) -> T:
    """Return ``what()`` as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (result := what()):
        assert time.monotonic() < deadline, f"not within {seconds} s: last {result!r}"
        time.sleep(0.02)
    return result
