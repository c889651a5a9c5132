"""Does the proxy end a long time under load with the memory and the descriptors that it began with?

    python benchmarks/soak.py --minutes 120

Before it is a simulated vLLM; keys, limits and usage are kept in SQLite. Clients ask for small answers and streams,
with and without limits on their keys; leave in the middle of streams, by FIN and by RST; upload; show no key; open
WebSockets and leave; leave behind half a head; and read nothing of large answers. Memory and descriptors are taken when
all of them pause: after a minute to warm up, each tenth of the time, and at the end.
"""

import argparse
import asyncio
import http.client
import json
import random
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from _running import HOST, allow_many_files, descriptors_of, free_port, mib, process, rss_of

MASTER = "sk-master-for-a-soak-0123456789"
#: Longer than an idle connection to vLLM is kept.
PAUSE = 6.0


class Load:
    """Everything that clients do, chosen at random.

    :ivar done: how often each was done; ``failed``: how often it went otherwise than it should.
    """

    def __init__(self, port: int, keys: list[str]) -> None:
        self._port = port
        self._keys = keys
        self._random = random.Random(0)
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    async def run(self, seconds: float, clients: int) -> None:
        """Do it for that long."""
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._client(until) for _ in range(clients)))

    async def _client(self, until: float) -> None:
        acts: list[Callable[[], Awaitable[None]]] = [
            *([self.small] * 6),
            *([self.stream] * 4),
            *(self.leaves, self.resets, self.upload, self.stranger, self.websocket, self.half_a_head, self.no_reader),
        ]
        while time.monotonic() < until:
            act = self._random.choice(acts)
            try:
                async with asyncio.timeout(30):
                    await act()
            except (OSError, TimeoutError, AssertionError, asyncio.IncompleteReadError) as error:
                self.failed[f"{act.__name__}: {error!r}"] += 1
            self.done[act.__name__] += 1

    def _request(self, pace: str, key: str | None = None, **body: object) -> bytes:
        body = {"model": "qwen2.5-7b-instruct", "messages": [{"role": "user", "content": "hello"}], **body}
        data = json.dumps(body).encode()
        lines = [
            "POST /vllm/v1/chat/completions HTTP/1.1",
            "Host: proxy",
            "Content-Type: application/json",
            f"Authorization: Bearer {key or self._random.choice(self._keys)}",
            f"X-Vllmsim: {pace}",
            f"Content-Length: {len(data)}",
        ]
        return "\r\n".join([*lines, "", ""]).encode() + data

    async def _answer(self, reader: asyncio.StreamReader) -> int:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head.split(None, 2)[1])
        if b"transfer-encoding: chunked" in head:
            while size := int(await reader.readuntil(b"\r\n"), 16):
                await reader.readexactly(size + 2)
            await reader.readexactly(2)
        else:
            await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
        return status

    async def _ask(self, data: bytes, expected: int, times: int = 1) -> None:
        reader, writer = await asyncio.open_connection(HOST, self._port)
        try:
            for _ in range(times):
                writer.write(data)
                status = await self._answer(reader)
                assert status == expected, status
        finally:
            writer.close()

    async def small(self) -> None:
        await self._ask(self._request("ttft=0.01", max_tokens=4), 200, times=5)

    async def stream(self) -> None:
        await self._ask(self._request("ttft=0.01; tpot=0.005", max_tokens=50, stream=True), 200)

    async def upload(self) -> None:
        await self._ask(self._request("echo", padding="x" * 300_000), 200)

    async def stranger(self) -> None:
        await self._ask(self._request("", key="sk-nobody"), 401)

    async def _leave(self, data: bytes, seconds: float, *, reset: bool = False, read: bool = True) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(sock, (HOST, self._port))
            await loop.sock_sendall(sock, data)
            if read:
                assert await loop.sock_recv(sock, 12)
            await asyncio.sleep(seconds)
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        finally:
            sock.close()

    async def leaves(self) -> None:
        await self._leave(self._request("ttft=0.01; tpot=0.05", max_tokens=50, stream=True), 0.2)

    async def resets(self) -> None:
        await self._leave(self._request("ttft=0.01; tpot=0.05", max_tokens=50, stream=True), 0.2, reset=True)

    async def no_reader(self) -> None:
        await self._leave(self._request("bytes; length=4000000"), 0.5, read=False)

    async def half_a_head(self) -> None:
        await self._leave(b"POST /vllm/v1/chat/completions HTTP/1.1\r\nHost", 0.2, read=False)

    async def websocket(self) -> None:
        lines = [
            *("GET /vllm/v1/realtime HTTP/1.1", "Host: proxy", f"Authorization: Bearer {self._keys[0]}"),
            *("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ]
        await self._leave("\r\n".join([*lines, "", ""]).encode(), 0.2)


def make_key(port: int, **fields: object) -> str:
    """Make a virtual key."""
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    headers = {"Authorization": f"Bearer {MASTER}", "Content-Type": "application/json"}
    connection.request("POST", "/key/generate", json.dumps(fields), headers)
    key: str = json.loads(connection.getresponse().read())["key"]
    connection.close()
    return key


async def soak(pid: int, port: int, minutes: float, clients: int) -> None:
    """Load the proxy, and say what it holds whenever all pause."""
    many = {"rpm_limit": 10**9, "tpm_limit": 10**12, "max_parallel_requests": 10**6}
    load = Load(port, [make_key(port), make_key(port, **many)])
    for part in range(11):
        await load.run(60 if part == 0 else minutes * 6, clients)
        await asyncio.sleep(PAUSE)
        done = load.done.total()
        what = "warmed up" if part == 0 else f"{part * minutes / 10:g} min"
        print(f"{what}: {mib(rss_of(pid))}, {descriptors_of(pid)} descriptors, {done} acts so far", flush=True)
    print(f"acts: {dict(sorted(load.done.items()))}")
    print(f"went otherwise: {dict(load.failed) or 'none'}")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--clients", type=int, default=50)
    options = parser.parse_args()
    allow_many_files()
    upstream, port = free_port(), free_port()
    twistd = [str(Path(sys.executable).with_name("twistd")), "--nodaemon", "--pidfile="]
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "master-key").write_text(MASTER)
        listen = f"interface={HOST}"
        with (
            process(*twistd, "vllmsim", "--listen", f"tcp:{upstream}:{listen}", port=upstream, cwd=directory),
            process(
                *(*twistd, "vllmproxy", "--upstream", f"http://{HOST}:{upstream}", "--listen", f"tcp:{port}:{listen}"),
                *("--state-directory", directory, "--master-key-file", "master-key", "--access-log", "access.jsonl"),
                port=port,
                cwd=directory,
            ) as proxy,
            suppress(KeyboardInterrupt),
        ):
            asyncio.run(soak(proxy.pid, port, options.minutes, options.clients))


if __name__ == "__main__":
    main()
