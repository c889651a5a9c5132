"""A server under a base URL, asked with the standard library alone, so that nothing is added, decoded or followed."""

import http.client
import json
import re
from typing import Any
from urllib.parse import urlsplit

from attrs import frozen

SECONDS = 120


@frozen
class Reply:
    """One whole answer.

    :ivar headers: names in lower case, in their order.
    """

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The data of each server-sent event; ``[DONE]`` as it is."""
        lines = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Server:
    """vLLM, or vLLM through the proxy."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = urlsplit(url.rstrip("/"))
        self._auth = {"Authorization": f"Bearer {key}"} if key else {}

    def begin(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], *, auth: bool = True
    ) -> http.client.HTTPConnection:
        """Send a request and return the connection before its answer."""
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._url.netloc, timeout=SECONDS)
        connection.request(method, self._url.path + path, body, {**(self._auth if auth else {}), **headers})
        return connection

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: dict[str, str] | None = None,
        *,
        auth: bool = True,
    ) -> Reply:
        """Return the answer; a ``body`` that is not ``bytes`` is sent as JSON."""
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        connection = self.begin(method, path, body, sent, auth=auth)
        try:
            answer = connection.getresponse()
            lines = [(name.lower(), value) for name, value in answer.getheaders()]
            return Reply(answer.status, answer.reason, lines, answer.read())
        finally:
            connection.close()

    def model(self) -> str:
        """The first model it serves."""
        name: str = self.ask("GET", "/v1/models").json()["data"][0]["id"]
        return name

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have ``labels``."""
        total = 0.0
        for line in self.ask("GET", "/metrics").body.decode().splitlines():
            found = re.fullmatch(re.escape(name) + r"(?:\{(.*)\})? (\S+)", line)
            if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
                total += float(found[2])
        return total
