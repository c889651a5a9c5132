"""The shared store: several processes or machines meet in one Redis (6.2 or newer) or Valkey.

What is kept, and all that an ACL user needs (``~vllmproxy:*``, and the commands named in this module and the
next)::

    vllmproxy:schema            the version of this layout
    vllmproxy:{TOKEN}:key       a hash: row (JSON), alias (where there is one)
    vllmproxy:alias:ALIAS       the token

The braces give whatever belongs to one key one hash tag. Nothing has a time to live: an expired key must
still be known, so that its owner is told that it has expired.
"""

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from txredisapi import RedisError

from vllmproxy.keys.key import VirtualKey
from vllmproxy.store.address import parse_redis_url
from vllmproxy.store.calls import Calls
from vllmproxy.store.interface import AliasTaken, CannotOpenStore, StoreUnavailable, TokenTaken
from vllmproxy.store.link import Link, Wire
from vllmproxy.store.rows import dump_row, load_row, name_bytes, name_text

# A script sent to a Redis that was stopped runs when it goes on, after the caller was told that it failed.
# Hence ARGV[1], the time on the server's clock after which nobody waits for the key any more.
_ADD = """
local now = redis.call('TIME')
if now[1] + now[2] / 1000000 > tonumber(ARGV[1]) then return 'late' end
if redis.call('EXISTS', KEYS[1]) == 1 then return 'token' end
if KEYS[2] then
  if redis.call('EXISTS', KEYS[2]) == 1 then return 'alias' end
  redis.call('SET', KEYS[2], ARGV[3])
  redis.call('HSET', KEYS[1], 'alias', ARGV[4])
end
redis.call('HSET', KEYS[1], 'row', ARGV[2])
return 'added'
"""

_DELETE = """
local deleted = {}
for place, name in ipairs(KEYS) do
  local alias = redis.call('HGET', name, 'alias')
  if redis.call('DEL', name) == 1 then
    deleted[#deleted + 1] = place
    if alias then redis.call('DEL', 'vllmproxy:alias:' .. alias) end
  end
end
return deleted
"""


class RedisStore:
    """The :class:`~vllmproxy.store.interface.Store` in Redis, over one connection that comes back by itself.

    :param url: see :func:`~vllmproxy.store.address.parse_redis_url`.
    :param reactor: what Twisted's client endpoints need: it connects, resolves names, and tells the time.
    :param timeout: seconds that a call may take.
    :param lookup_timeout: seconds that :meth:`get_key` may take, which a caller's request waits for.
    :raises ValueError: a bad URL; the message does not repeat it.
    """

    def __init__(self, url: str, reactor: Any, *, timeout: float = 2.0, lookup_timeout: float = 0.25) -> None:
        self._address = parse_redis_url(url)
        self._clock = reactor
        self._timeout = timeout
        self._lookup_timeout = lookup_timeout
        self._link = Link(self._address, reactor)
        self._calls = Calls(reactor)

    async def open(self) -> None:
        self._link.open()
        opened = False
        try:
            await self._link.get()
            opened = True
        except StoreUnavailable as error:
            raise CannotOpenStore(str(error)) from None
        finally:
            if not opened:
                await self._link.close()

    async def close(self) -> None:
        self._calls.end()
        await self._link.close()

    async def ping(self) -> None:
        await self._ask(self._timeout, Wire.ping)

    async def add_key(self, key: VirtualKey) -> None:
        not_after = self._clock.seconds() + self._timeout
        token, row = name_bytes(key.token), dump_row(key)
        names, values = [_key(token)], [row, token]
        if key.key_alias is not None:
            alias = name_bytes(key.key_alias)
            names.append(_alias(alias))
            values.append(alias)

        def limited(wire: Wire) -> list[Any]:
            return [f"{not_after + wire.offset:.6f}", *values]

        answer = await self._ask(self._timeout, lambda wire: wire.eval(_ADD, names, limited(wire)))
        if answer == b"token":
            raise TokenTaken
        if answer == b"alias":
            raise AliasTaken
        if answer != b"added":
            raise StoreUnavailable(f"{self._address} answered too late, or a clock was set")

    async def get_key(self, token: str) -> VirtualKey | None:
        name = _key(name_bytes(token))
        row = await self._ask(self._lookup_timeout, lambda wire: wire.execute_command("HGET", name, "row"))
        try:
            return None if row is None else load_row(row)
        except ValueError as error:
            raise StoreUnavailable(f"{self._address} holds something else than a key's row: {error}") from error

    async def find_aliases(self, aliases: Sequence[str]) -> dict[str, str]:
        names = [_alias(name_bytes(alias)) for alias in aliases]
        if not names:
            await self.ping()
            return {}
        tokens = await self._ask(self._timeout, lambda wire: wire.mget(names))
        return {alias: name_text(token) for alias, token in zip(aliases, tokens, strict=True) if token is not None}

    async def delete_keys(self, tokens: Sequence[str]) -> list[str]:
        names = [_key(name_bytes(token)) for token in tokens]
        places = await self._ask(self._timeout, lambda wire: wire.eval(_DELETE, names))
        return [tokens[place - 1] for place in places]

    async def _ask(self, seconds: float, command: Callable[[Wire], Deferred[Any]]) -> Any:
        """Return Redis's reply. A call that is cancelled or late leaves its place in the queue of replies."""
        started = self._clock.seconds()
        used: list[Wire] = []

        async def exchange() -> Any:
            used.append(await self._link.get())
            return await command(used[0])

        def late() -> None:
            for wire in used:
                wire.unanswered(started, self._clock.seconds())

        try:
            return await self._calls.run(Deferred.fromCoroutine(exchange()), seconds, late)
        except RedisError as error:
            raise StoreUnavailable(f"{self._address}: {error}") from error


def _key(token: bytes) -> bytes:
    return b"vllmproxy:{%b}:key" % token


def _alias(alias: bytes) -> bytes:
    return b"vllmproxy:alias:" + alias
