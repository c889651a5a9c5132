"""A Redis master, its replica and the sentinels that watch them, for tests."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from _redis import RedisServer, redis_binary, redis_server

#: What the sentinels call the master.
NAME = "mymaster"


class Group:
    """One master, one replica, and sentinels that make a failover after two seconds.

    :ivar master: where the group began; after a failover it is the other one that is the master.
    :ivar sentinels: their ports on 127.0.0.1.
    """

    def __init__(self, master: RedisServer, replica: RedisServer, sentinels: list["Sentinel"]) -> None:
        self.master = master
        self.replica = replica
        self.sentinels = sentinels

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{NAME}"

    def role(self, server: RedisServer) -> str:
        return server.command("ROLE").split(b"\r\n")[2].decode()

    def fail_over(self) -> None:
        """Have a sentinel make the replica the master, in good order, and wait until it is."""
        _until(lambda: self.sentinels[0].command("SENTINEL", "FAILOVER", NAME) == b"+OK\r\n")
        self.wait_for_failover()

    def wait_for_failover(self) -> None:
        """Wait until the replica is the master and every sentinel says so."""
        port = str(self.replica.port).encode()
        _until(lambda: self.role(self.replica) == "master")
        for sentinel in self.sentinels:
            _until(lambda s=sentinel: port in s.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME))  # type: ignore[misc]


class Sentinel(RedisServer):
    """A sentinel; it writes what it learns into its own configuration file."""

    def __init__(self, master: int) -> None:
        super().__init__()
        self._config = self.directory / "sentinel.conf"
        self.configure(master)

    def configure(self, master: int, *more: str) -> None:
        """Forget everything, and watch the master on that port from the next start on."""
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {self.directory}",
            f"sentinel monitor {NAME} 127.0.0.1 {master} 1",
            f"sentinel down-after-milliseconds {NAME} 2000",
            f"sentinel failover-timeout {NAME} 3000",
            *more,
        ]
        self._config.write_text("".join(f"{line}\n" for line in lines))

    def start(self) -> None:
        with open(self.directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                [redis_binary(), str(self._config), "--sentinel"], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        _until(self._answers)


def replica_of(master: RedisServer, *options: str) -> AbstractContextManager[RedisServer]:
    """Run a replica of ``master`` for the length of a ``with``."""
    return redis_server("--replicaof", "127.0.0.1", str(master.port), *options)


@contextmanager
def sentinel_group(count: int = 2, *options: str) -> Iterator[Group]:
    """Run a group with so many sentinels; ``options`` are those of both Redis servers."""
    with redis_server(*options) as master, replica_of(master, *options) as replica:
        sentinels = [Sentinel(master.port) for _ in range(count)]
        try:
            for sentinel in sentinels:
                sentinel.start()
            group = Group(master, replica, sentinels)
            _until(lambda: b"master_link_status:up" in replica.command("INFO", "replication"))
            for sentinel in sentinels:
                _until(lambda s=sentinel: str(replica.port).encode() in s.command("SENTINEL", "REPLICAS", NAME))  # type: ignore[misc]
                _until(lambda s=sentinel: f"sentinels={count}".encode() in s.command("INFO", "sentinel"))  # type: ignore[misc]
            yield group
        finally:
            for sentinel in sentinels:
                sentinel.remove()


def _until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not _holds(what):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _holds(what: Callable[[], bool]) -> bool:
    try:
        return what()
    except (OSError, IndexError):
        return False  # a sentinel ends every connection to a server whose role it changes
