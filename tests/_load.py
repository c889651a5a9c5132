"""Clients by the handful whose every request has an end user of its own, so that the sums tell what became of it."""

import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Literal

from _asking import CHAT, ask, bearer
from _raw import Wire, connect, request
from _service import MASTER_KEY, Twistd
from attrs import define, field, frozen

MODEL = CHAT["model"]

#: In micro-units for each token, so that what a request costs is a whole number of them.
INPUT, OUTPUT = 1, 3
PRICES = f'[models."*"]\ninput = {INPUT}.0\noutput = {OUTPUT}.0\n'

#: ``whole``: an answer came, to its end. ``broken``: it did not. ``unsent``: nobody took the connection.
Outcome = Literal["begun", "whole", "broken", "unsent"]


@frozen
class Key:
    """A virtual key; ``counted``: the proxy reads its requests' bodies and asks vLLM for the usage of its streams."""

    secret: str
    counted: bool


@define(eq=False)
class Asked:
    """One request and what became of it.

    :ivar end_user: also its ``X-Request-Id``, by which the simulator counts what it was asked to do.
    :ivar prompt_tokens: as vLLM counts them, as ``completion_tokens``.
    """

    end_user: str
    key: Key
    path: str
    body: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    outcome: Outcome = "begun"
    status: int = 0

    @property
    def headers(self) -> dict[str, str]:
        return {
            **bearer(self.key.secret),
            "Content-Type": "application/json",
            "x-litellm-customer-id": self.end_user,
            "X-Request-Id": self.end_user,
            "X-Vllmsim": "ttft=0.005; tpot=0.002",
        }

    def ask(self, service: Twistd) -> None:
        """Ask, and read the answer to its end, if it has one."""
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
        try:
            connection.connect()
        except OSError:
            self.outcome = "unsent"
            return
        try:
            connection.request("POST", self.path, json.dumps(self.body), self.headers)
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            self.outcome = "broken"
        else:
            self.status = answer.status
            self.outcome = "whole"
        finally:
            connection.close()


@define
class Crowd:
    """Who asks.

    :ivar asked: every request so far.
    """

    keys: Sequence[Key]
    asked: list[Asked] = field(factory=list)
    _numbers: Iterator[int] = field(factory=count)

    def compose(self) -> Asked:
        """Return the next request: of each key, plain ones and streams, on three routes."""
        number = next(self._numbers)
        key = self.keys[number % len(self.keys)]
        kind = number // len(self.keys) % 5
        words, tokens = 1 + number % 7, 2 + number % 11
        messages = [{"role": "user", "content": " ".join(["word"] * words)}]
        body: dict[str, Any] = {"model": MODEL, "max_tokens": tokens, "messages": messages}
        path = "/vllm/v1/messages" if kind == 4 else "/vllm/v1/chat/completions"
        if kind == 3:
            path = "/vllm/v1/completions"
            body["prompt"] = body.pop("messages")[0]["content"]
        if kind != 0:
            body["stream"] = True
        if kind == 1 or (kind in (2, 3) and not key.counted):
            body["stream_options"] = {"include_usage": True}
        asked = Asked(f"user-{number}", key, path, body, words, tokens)
        self.asked.append(asked)
        return asked

    @contextmanager
    def asking(self, service: Twistd, clients: int = 6) -> Iterator[None]:
        """Ask all the time, from several threads, until the end of the block."""
        stop = threading.Event()

        def client() -> None:
            while not stop.is_set():
                asked = self.compose()
                asked.ask(service)
                stop.wait(0.01 if asked.outcome == "unsent" or asked.status >= 500 else 0)

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def stall(self, service: Twistd, key: Key) -> tuple[Asked, Wire]:
        """Begin a stream that never ends, and return when some of it has come."""
        number = next(self._numbers)
        body = {**CHAT, "max_tokens": 50, "stream": True}
        asked = Asked(f"user-{number}", key, "/vllm/v1/chat/completions", body, 1, 50, outcome="broken")
        self.asked.append(asked)
        lines = [
            f"{name}: {value}".encode()
            for name, value in asked.headers.items()
            if name in ("x-litellm-customer-id", "X-Request-Id")
        ]
        lines.append(b"X-Vllmsim: stall; after=400")
        wire = connect(service)
        wire.send(
            request(
                b"POST",
                asked.path.encode(),
                *lines,
                body=json.dumps(body).encode(),
                key=b"x-api-key: " + key.secret.encode(),
            )
        )
        assert wire.head().status == 200
        wire.chunk()
        return asked, wire

    @property
    def whole(self) -> int:
        """How many have had an answer to its end."""
        return sum(asked.outcome == "whole" for asked in self.asked)

    @property
    def served(self) -> int:
        """How many of these were vLLM's."""
        return sum(asked.outcome == "whole" and asked.status == 200 for asked in self.asked)


def usage(service: Twistd, group: str) -> dict[str, dict[str, Any]]:
    """Return the sums by one of their names."""
    reply = ask(service, "GET", f"/usage?group_by={group}", key=MASTER_KEY)
    assert reply.status == 200, reply.body
    rows = {row[group]: row for row in reply.json()["usage"]}
    assert len(rows) == len(reply.json()["usage"])
    return rows


def executed(sim: Twistd) -> dict[str, int]:
    """Return how often the upstream was asked to do each request."""
    found: dict[str, int] = ask(sim, "GET", "/vllmsim/stats").json()["executed"]
    return found


def is_exact(row: dict[str, Any], asked: Asked) -> bool:
    """Tell whether a sum is that of exactly one request, with exactly its tokens and what they cost."""
    found = [row[name] for name in ("requests", "estimated_requests", "unknown_requests")]
    tokens = (row["prompt_tokens"], row["completion_tokens"])
    spend = asked.prompt_tokens * INPUT + asked.completion_tokens * OUTPUT
    return (
        found == [1, 0, 0] and tokens == (asked.prompt_tokens, asked.completion_tokens) and row["spend"] == spend / 1e6
    )


def check_sums(service: Twistd, sim: Twistd, crowd: Crowd, *, killed: bool = True) -> None:
    """Compare what was asked, what the upstream did and what is summed up.

    :param killed: nobody could count what had passed of the answers that broke off.
    """
    rows, done = usage(service, "end_user"), executed(sim)
    asked = {each.end_user: each for each in crowd.asked}
    assert set(done) <= set(asked)
    assert set(done.values()) <= {1}
    assert set(done) <= set(rows) <= {each.end_user for each in crowd.asked if each.outcome != "unsent"}
    assert len(done) <= sum(row["requests"] for row in rows.values()) <= len(crowd.asked)
    for end_user, each in asked.items():
        row = rows.get(end_user)
        if each.outcome == "whole" and each.status == 200:
            assert row is not None, each
            assert is_exact(row, each), (row, each)
        elif each.outcome == "whole":
            assert row is None, (row, each)
        elif row is not None and not is_exact(row, each):
            how = (row["requests"], row["estimated_requests"], row["unknown_requests"])
            guessed, unknown = (1, 1, 0), (1, 0, 1)
            if killed:
                assert how == (guessed if each.key.counted else unknown), (row, each)
                assert bool(row["total_tokens"]) is each.key.counted, (row, each)
            else:
                assert how in (guessed, unknown), (row, each)
    check_accounts(service, crowd.keys)


def check_accounts(service: Twistd, keys: Sequence[Key]) -> None:
    """Compare what keys have spent with their sums."""
    sums = usage(service, "key")
    for key in keys:
        reply = ask(service, "GET", f"/key/info?key={key.secret}", key=MASTER_KEY).json()
        (row,) = ask(service, "GET", f"/usage?group_by=key&key={key.secret}", key=MASTER_KEY).json()["usage"]
        assert row == sums[row["key"]]
        assert reply["info"]["spend"] == row["spend"]
