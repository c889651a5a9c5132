"""A bounded number of places, a bounded line before them, and how many one client may have of both. Pure."""

from collections.abc import Hashable
from ipaddress import IPv6Address, ip_address
from typing import Generic, Literal, TypeVar

T = TypeVar("T", bound=Hashable)

#: What became of one who came: has a place; stands in the line; turned away, because there is neither a place nor a
#: line, because the line is full, or because its client has as many as it may.
Entry = Literal["placed", "waiting", "no_place", "line_full", "client_full"]


class Places(Generic[T]):
    """Who has a place, and who stands in the line for one, in the order in which they came.

    :param most: how many places there are; 0 for any number.
    :param line: how many may wait.
    :param per_client: how many a client may have, waiting ones included; 0 for any number.
    :ivar counts_clients: it matters who somebody comes for.
    """

    def __init__(self, most: int = 0, *, line: int = 0, per_client: int = 0) -> None:
        self._most = most
        self._line = line
        self._per_client = per_client
        self.counts_clients = per_client > 0
        self._placed: dict[T, str] = {}
        self._waiting: dict[T, str] = {}
        self._of_client: dict[str, int] = {}
        self._closed = False

    @property
    def taken(self) -> int:
        """How many places are taken."""
        return len(self._placed)

    @property
    def waiting(self) -> int:
        """How many stand in the line."""
        return len(self._waiting)

    def enter(self, item: T, client: str) -> Entry:
        """Give ``item`` a place, or one in the line, if there is any. It must have neither.

        :param client: who it is for; empty for nobody in particular, who may have any number.
        """
        if client and self._per_client and self._of_client.get(client, 0) >= self._per_client:
            return "client_full"
        if not self._most or len(self._placed) < self._most:  # nobody waits while there is a place
            self._placed[item] = client
        elif len(self._waiting) < self._line:
            self._waiting[item] = client
        else:
            return "line_full" if self._line else "no_place"
        if client:
            self._of_client[client] = self._of_client.get(client, 0) + 1
        return "placed" if item in self._placed else "waiting"

    def leave(self, item: T) -> T | None:
        """Take back what ``item`` has, if it has anything, and return who has its place now, if anybody has."""
        client = self._placed.pop(item, None)
        had_place = client is not None
        if not had_place:
            client = self._waiting.pop(item, None)
        if client:
            self._forget(client)
        return self._call() if had_place and self._waiting else None

    def close(self) -> None:
        """Nobody's turn comes any more."""
        self._closed = True

    def _call(self) -> T | None:
        if self._closed:
            return None
        first = next(iter(self._waiting))
        self._placed[first] = self._waiting.pop(first)
        return first

    def _forget(self, client: str) -> None:
        left = self._of_client[client] - 1
        if left:
            self._of_client[client] = left
        else:
            del self._of_client[client]


def client_named(address: str) -> str:
    """Return what an address is counted as: an IPv6 one by its /64, all of which one client has (RFC 6177).

    What is no address, as a UNIX socket's peer has none, is nobody in particular: empty.
    """
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return ""
    if ip.version == 4:
        return str(ip)
    return str(ip.ipv4_mapped or IPv6Address(int(ip) >> 64 << 64))
