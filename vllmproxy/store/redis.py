"""The shared store: several processes or machines meet in one Redis (6.2 or newer) or Valkey.

What is kept is said in :mod:`vllmproxy.store.redis_schema`. An ACL user needs ``~vllmproxy:*``, and the commands
named there, here, in :mod:`vllmproxy.store.link` and in :mod:`vllmproxy.store.dialling`, and to hear and tell of
changes also ``&vllmproxy:*``. The braces give whatever belongs to one key one hash tag.
No key has a time to live: an expired one must still be known, so that its owner is told that it has expired.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from txredisapi import RedisError

from vllmproxy.keys.key import VirtualKey
from vllmproxy.limits.ahead import Ahead
from vllmproxy.limits.interface import Limiter
from vllmproxy.store.address import parse_redis_url
from vllmproxy.store.calls import Calls
from vllmproxy.store.changes import (
    LIST_SECONDS,
    AccountChanges,
    AliasChanges,
    Changes,
    account_changes,
    alias_changes,
)
from vllmproxy.store.interface import (
    AliasTaken,
    CannotOpenStore,
    Decide,
    StoredEntry,
    StoreUnavailable,
    Writes,
)
from vllmproxy.store.limits_redis import RedisLimiter
from vllmproxy.store.link import Link, Wire
from vllmproxy.store.listing import KeyPage, KeyQuery, Selection
from vllmproxy.store.lookups import Lookups
from vllmproxy.store.redis_schema import AUDIT_KEY, INDEX_KEY, account_name, alias_name, key_name
from vllmproxy.store.rows import dump_entry, dump_row, load_entry, name_bytes, name_text
from vllmproxy.store.subscription import Subscription
from vllmproxy.store.usage_redis import RedisUsage
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.ledger import Tally
from vllmproxy.usage.sums import Account, UsageQuery, UsageSum

# A script sent to a Redis that was stopped runs when it goes on, after the caller was told that it failed.
# Hence ARGV[1], the time on the server's clock after which nobody waits for the change any more. Then come, counted
# in ARGV[2..7]: the rows that the decision was made from ('' for none), each with what becomes of it ('' for nothing,
# 'remove', or a new row) and its place in the index; aliases that are freed, are given, must be nobody's; accounts that
# are inherited, each after its heir's; accounts that are set, to a period and money. Not counted: accounts that go;
# entries.
_CHANGE = """
local now = redis.call('TIME')
if now[1] + now[2] / 1000000 > tonumber(ARGV[1]) then return 'late' end
local keys, freed, given, taken = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local name, arg, inherited, spent = 2, 7, {}, tonumber(ARGV[7])
for place = 1, keys do
  if (redis.call('HGET', KEYS[name + place], 'row') or '') ~= ARGV[arg + 4 * place - 3] then return 'changed' end
end
local aliases = name + keys
for place = aliases + freed + given + 1, aliases + freed + given + taken do
  if redis.call('EXISTS', KEYS[place]) == 1 then return 'alias' end
end
local accounts = aliases + freed + given + taken
for heir = 1, tonumber(ARGV[6]) do inherited[heir] = redis.call('HGETALL', KEYS[accounts + 2 * heir]) end
local said = accounts + 2 * #inherited
-- Asked for here too: what is no account fails before anything is written.
for place = said + 1, said + spent do redis.call('HGET', KEYS[place], 'period') end
for place = 1, keys do
  local row, token, score = ARGV[arg + 4 * place - 2], ARGV[arg + 4 * place - 1], ARGV[arg + 4 * place]
  -- pcall: what was written stays written, and answered, when this user may not publish.
  if row ~= '' then redis.pcall('PUBLISH', 'vllmproxy:changes', token) end
  if row == 'remove' then
    redis.call('DEL', KEYS[name + place])
    redis.call('ZREM', KEYS[1], token)
  elseif row ~= '' then
    redis.call('HSET', KEYS[name + place], 'row', row)
    redis.call('ZADD', KEYS[1], score, token)
  end
end
arg = arg + 4 * keys
for place = aliases + 1, aliases + freed do redis.call('DEL', KEYS[place]) end
for place = 1, given do redis.call('SET', KEYS[aliases + freed + place], ARGV[arg + place]) end
for place = said + spent + 1, #KEYS do redis.call('DEL', KEYS[place]) end
for heir, account in ipairs(inherited) do
  if #account > 0 then  -- what requests under way hold, they let go of at the key that they came with
    redis.call('HSET', KEYS[accounts + 2 * heir - 1], unpack(account))
    redis.call('HDEL', KEYS[accounts + 2 * heir - 1], 'held0', 'held_tokens0', 'held1', 'held_tokens1')
  end
end
arg = arg + given
for place = 1, spent do  -- what is held is of its period
  local account, period, money = KEYS[said + place], ARGV[arg + 2 * place - 1], ARGV[arg + 2 * place]
  if money == '0' or (redis.call('HGET', account, 'period') or '0') ~= period then redis.call('DEL', account) end
  redis.call('HSET', account, 'period', period, 'spend', money)
end
for place = arg + 2 * spent + 1, #ARGV do redis.call('XADD', KEYS[2], '*', 'entry', ARGV[place]) end
return 'done'
"""

_ROWS = """
local rows = {}
for place, name in ipairs(KEYS) do rows[place] = redis.call('HGET', name, 'row') end
return rows
"""


# A page of the index, and its length, as of one moment.
_PAGE = """
local rows = {}
for place, token in ipairs(redis.call(ARGV[1], KEYS[1], ARGV[2], ARGV[3])) do
  rows[place] = redis.call('HGET', 'vllmproxy:{' .. token .. '}:key', 'row')
end
return {redis.call('ZCARD', KEYS[1]), rows}
"""

_SCAN = """
local rows, scanned = {}, redis.call('ZSCAN', KEYS[1], ARGV[1], 'COUNT', 200)
for place = 1, #scanned[2], 2 do
  rows[#rows + 1] = redis.call('HGET', 'vllmproxy:{' .. scanned[2][place] .. '}:key', 'row')
end
return {scanned[1], rows}
"""


class RedisStore(Changes):
    """The :class:`~vllmproxy.store.interface.Store` in Redis, over one connection that comes back by itself.

    :param url: see :func:`~vllmproxy.store.address.parse_redis_url`.
    :param reactor: what Twisted's client endpoints need: it connects, resolves names, and tells the time.
    :param timeout: seconds that a call may take.
    :param lookup_timeout: seconds that :meth:`get_key` may take, which a caller's request waits for.
    :raises ValueError: a bad URL; the message does not repeat it.
    """

    def __init__(self, url: str, reactor: Any, *, timeout: float = 2.0, lookup_timeout: float = 0.2) -> None:
        self._address = parse_redis_url(url)
        self._clock = reactor
        self._timeout = timeout
        self._link = Link(self._address, reactor)
        self._calls = Calls(reactor)
        self._lookups = Lookups(self._link, reactor, lookup_timeout, str(self._address))
        self._usage = RedisUsage(self._link, reactor, timeout)
        self._limiters: list[RedisLimiter] = []
        self._watchers = []
        self._subscriptions: list[Subscription] = []

    def watch_keys(self, changed: Callable[[str | None], None]) -> None:
        super().watch_keys(changed)
        self._subscriptions.append(Subscription(self._link.dialler, self._clock, changed))

    def limiter(self, clock: IReactorTime) -> Limiter:
        limiter = RedisLimiter(self._link, clock)
        self._limiters.append(limiter)
        return Ahead(limiter, clock)

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
        for subscription in self._subscriptions:
            subscription.open()

    async def close(self) -> None:
        self._calls.end()
        self._lookups.end()
        self._usage.end()
        for limiter in self._limiters:
            limiter.close()
        for subscription in self._subscriptions:
            subscription.close()
        await self._link.close()

    async def ping(self) -> None:
        await self._ask(self._timeout, Wire.ping)

    def get_key(self, token: str) -> Deferred[VirtualKey | None]:
        return self._lookups.get(token)

    async def find_aliases(self, aliases: Sequence[str]) -> dict[str, str]:
        names = [alias_name(name_bytes(alias)) for alias in aliases]
        if not names:
            await self.ping()
            return {}
        tokens = await self._ask(self._timeout, lambda wire: wire.mget(names))
        return {alias: name_text(token) for alias, token in zip(aliases, tokens, strict=True) if token is not None}

    async def change_keys(self, tokens: Sequence[str], decide: Decide) -> Writes:
        tokens = tuple(dict.fromkeys(tokens))
        try:
            return await self._change_keys(tokens, decide)
        finally:
            # Also when Redis did not answer in time: it may have been done all the same.
            self._tell(tokens)

    async def _change_keys(self, tokens: Sequence[str], decide: Decide) -> Writes:
        not_after = self._clock.seconds() + self._timeout
        while True:
            rows = await self._rows(tokens, not_after - self._clock.seconds())
            found = {token: self._lookups.load(row) for token, row in rows.items()}
            writes = decide(found)
            changes = alias_changes(found, writes), account_changes(found, writes)
            names, values = _arguments(tokens, rows, writes, *changes)
            answer = await self._write(names, values, not_after)
            if answer == b"done":
                return writes
            if answer == b"alias":
                raise AliasTaken
            # Changed by somebody else in between: decide again, as long as there is time.
            if answer != b"changed" or self._clock.seconds() >= not_after:
                raise StoreUnavailable(f"{self._address} answered too late, or a clock was set")

    async def list_audit(self, limit: int, before: str | None = None) -> list[StoredEntry]:
        command = ("XREVRANGE", AUDIT_KEY, "+" if before is None else f"({before}", "-", "COUNT", limit)
        entries = await self._ask(self._timeout, lambda wire: wire.execute_command(*command))
        try:
            return [StoredEntry(id.decode("ascii"), load_entry(fields[1])) for id, fields in entries]
        except ValueError as error:
            raise StoreUnavailable(f"{self._address} holds something else than an audit entry: {error}") from error

    async def add_usage(
        self, writer: str, first: int, events: Sequence[UsageEvent], tally: Tally | None = None
    ) -> None:
        await self._usage.add(writer, first, events, tally)

    async def forget_writer(self, writer: str) -> None:
        await self._usage.forget(writer)

    async def read_usage(self, query: UsageQuery) -> list[UsageSum]:
        return await self._usage.read(query)

    async def read_account(self, token: str) -> Account:
        return await self._usage.account(token)

    async def _list(self, query: KeyQuery) -> KeyPage:
        if query.is_plain:
            span = ["ZREVRANGE" if query.descending else "ZRANGE", query.offset, query.offset + query.limit - 1]
            total, rows = await self._ask(self._timeout, lambda wire: wire.eval(_PAGE, [INDEX_KEY], span))
            return KeyPage(self._load_all(rows), total)
        not_after = self._clock.seconds() + LIST_SECONDS
        selection, cursor = Selection(query), b"0"
        while True:
            cursor, rows = await self._scan(cursor)
            selection.add(self._load_all(rows))
            if cursor == b"0":
                break
            if self._clock.seconds() > not_after:
                raise StoreUnavailable(f"{self._address} has too many keys to look at in {LIST_SECONDS:g} s")
        page = await self._rows(selection.page(), self._timeout)
        return KeyPage(self._load_all(page.values()), len(selection))

    async def _scan(self, cursor: bytes) -> Any:
        return await self._ask(self._timeout, lambda wire: wire.eval(_SCAN, [INDEX_KEY], [cursor]))

    def _load_all(self, rows: Iterable[bytes | None]) -> tuple[VirtualKey, ...]:
        """Return those of the keys that are there; an index may name one that an older version has deleted."""
        return tuple(self._lookups.load(row) for row in rows if row is not None)

    async def _rows(self, tokens: Sequence[str], seconds: float) -> dict[str, bytes]:
        names = [key_name(name_bytes(token)) for token in tokens]
        rows = await self._ask(seconds, lambda wire: wire.eval(_ROWS, names, []))
        return {token: row for token, row in zip(tokens, rows, strict=True) if row is not None}

    async def _write(self, names: list[bytes], values: list[Any], not_after: float) -> Any:
        def limited(wire: Wire) -> list[Any]:
            return [f"{not_after + wire.offset:.6f}", *values]

        seconds = not_after - self._clock.seconds()
        return await self._ask(seconds, lambda wire: wire.eval(_CHANGE, names, limited(wire)))

    async def _ask(self, seconds: float, command: Callable[[Wire], Deferred[Any]]) -> Any:
        """Return Redis's reply. A call that is cancelled or late leaves its place in the queue of replies."""
        started = self._clock.seconds()
        wire: Wire | None = None

        async def exchange() -> Any:
            nonlocal wire
            wire = await self._link.get()
            return await command(wire)

        def late() -> None:
            self._link.late(wire, started)

        try:
            return await self._calls.run(Deferred.fromCoroutine(exchange()), seconds, late)
        except RedisError as error:
            raise StoreUnavailable(f"{self._address}: {error}") from error


def _arguments(
    tokens: Sequence[str],
    rows: Mapping[str, bytes],
    writes: Writes,
    aliases: AliasChanges,
    accounts: AccountChanges,
) -> tuple[list[bytes], list[Any]]:
    """Return the names and the values, but the first, that :data:`_CHANGE` wants."""
    new = dict.fromkeys(writes.remove, ("remove", 0.0))
    new |= {key.token: (dump_row(key), key.created_at) for key in writes.put}
    names = [INDEX_KEY, AUDIT_KEY, *(key_name(name_bytes(token)) for token in tokens)]
    names += [alias_name(name_bytes(alias)) for alias in (*aliases.freed, *aliases.given, *aliases.taken)]
    passed = [token for pair in accounts.inherited.items() for token in pair]
    names += [account_name(name_bytes(token)) for token in (*passed, *accounts.spent, *accounts.ended)]
    values: list[Any] = [len(tokens), len(aliases.freed), len(aliases.given), len(aliases.taken)]
    values += [len(accounts.inherited), len(accounts.spent)]
    for token in tokens:
        row, created = new.get(token, ("", 0.0))
        values += [rows.get(token, b""), row, name_bytes(token), repr(float(created))]
    values += [name_bytes(token) for token in aliases.given.values()]
    values += [word for said in accounts.spent.values() for word in (said.period, said.money)]
    return names, values + [dump_entry(entry) for entry in writes.audit]
