"""Sums and accounts in Redis; the names are in :mod:`vllmproxy.store.redis_schema`.

Numbers alone make an addition happen once, as long as its writer is known. The scripts are kept from running late all
the same: a writer may have been forgotten meanwhile.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from vllmproxy.store.changes import LIST_SECONDS
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.link import Link
from vllmproxy.store.redis_schema import account_name, day_name, sums_names, writer_name
from vllmproxy.store.rows import name_bytes, name_text
from vllmproxy.store.scripts import Scripts
from vllmproxy.store.usage_lua import ACCOUNT, ADD, FORGET, KEYS_OF_DAY, LAST, OVERLAP, SUMS
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.ledger import (
    KEPT_DAYS,
    MOST_END_USERS,
    MOST_MODELS,
    OTHER,
    Batch,
    Summing,
    Tally,
    batch_of,
    days_of,
    unseen,
)
from vllmproxy.usage.sums import Account, UsageQuery, UsageSum

_log = Logger(namespace=__name__)

#: Days that the number of a writer's last event is kept for after it was last heard of.
WRITER_DAYS: Final = 90

_DAY: Final = 86_400
#: Events in one script that may all be unlike, and rows and hashes that one reads: each holds Redis up for a few
#: milliseconds at most.
_EVENTS: Final = 200
_ROWS: Final = 2000
_HASHES: Final = 500


class RedisUsage:
    """What :class:`~vllmproxy.store.redis.RedisStore` keeps of usage; the methods are those of a store.

    :param timeout: seconds that one script may take.
    """

    def __init__(self, link: Link, clock: IReactorTime, timeout: float) -> None:
        self._clock = clock
        self._scripts = Scripts(link, clock, timeout)

    def end(self) -> None:
        """Fail every call under way: the store closes."""
        self._scripts.end()

    async def add(self, writer: str, first: int, events: Sequence[UsageEvent], tally: Tally | None) -> None:
        """Add ``events`` in pieces, each with a number of its own; a piece is added whole or not at all."""
        if not events:
            await self.last(writer)
        if tally is not None and tally.unlike <= _EVENTS:
            await self._add(writer, first, events, tally)
            return
        for start in range(0, len(events), _EVENTS):
            await self._add(writer, first + start, events[start : start + _EVENTS])

    async def last(self, writer: str) -> int:
        (last,) = await self._run(LAST, [writer_name(name_bytes(writer))], [])
        return int(last)

    async def forget(self, writer: str) -> None:
        await self._run(FORGET, [writer_name(name_bytes(writer))], [])

    async def read(self, query: UsageQuery) -> list[UsageSum]:
        not_after = self._clock.seconds() + LIST_SECONDS
        summing = Summing(query)
        hashes = [(day, key) for day in days_of(query) for key in await self._keys_of(day, query.key)]
        begun: dict[str, str] = {}
        cursor, place = b"0", 0
        while place < len(hashes):
            if self._clock.seconds() > not_after:
                raise StoreUnavailable(f"there are too many sums to look at in {LIST_SECONDS:g} s")
            names = [sums_names(day, key)[0] for day, key in hashes[place : place + _HASHES]]
            cursor, found = await self._run(SUMS, names, [cursor, _ROWS])
            ended = _rows(found)
            # What a cursor goes past may be seen twice, so a hash counts once it was read to its end.
            ended[0] = begun | ended[0]
            begun = ended.pop() if cursor != b"0" else {}
            for rows in ended:
                _sum_up(summing, *hashes[place], rows)
                place += 1
        return summing.result()

    async def account(self, token: str) -> Account:
        values = await self._run(ACCOUNT, [account_name(name_bytes(token))], [])
        try:
            return Account(*[int(value or 0) for value in values])
        except ValueError as error:
            raise StoreUnavailable(f"it holds something else than an account: {error}") from error

    async def _add(self, writer: str, first: int, events: Sequence[UsageEvent], tally: Tally | None = None) -> None:
        while events:
            names, words = _arguments(writer, first, len(events), batch_of(events, tally))
            what, _, *more = await self._scripts.run(self._scripts.call(ADD, names, _words(words)))
            if what != OVERLAP:
                for name, why in zip(more[::2], more[1::2], strict=True):
                    _log.error(
                        "Adding usage at {name} in the Redis failed: {why}", name=name_text(name), why=name_text(why)
                    )
                return
            # Somebody has sent some of these before; only those after them can be added.
            rest = unseen(first, events, more[0])
            first, events = first + len(events) - len(rest), rest

    async def _keys_of(self, day: str, only: str | None) -> list[bytes]:
        if only is not None:
            return [name_bytes(only)]
        keys: set[bytes] = set()
        cursor = b"0"
        while True:
            cursor, some = await self._run(KEYS_OF_DAY, [day_name(day)], [cursor])
            keys.update(some)
            if cursor == b"0":
                return sorted(keys)

    async def _run(self, script: str, names: list[bytes], words: list[Any]) -> list[Any]:
        _, _, *answer = await self._scripts.run(self._scripts.call(script, names, _words(words)))
        return answer


def _arguments(writer: str, first: int, count: int, batch: Batch) -> tuple[list[bytes], list[Any]]:
    """Return the names and the words, but the first, that :data:`ADD` wants."""
    names = [writer_name(name_bytes(writer))]
    words: list[Any] = [first, count, WRITER_DAYS * _DAY, KEPT_DAYS * _DAY]
    words += [MOST_MODELS, MOST_END_USERS, OTHER, len(batch.sums)]
    for (day, key), rows in batch.sums.items():
        names += [day_name(day), *sums_names(day, name_bytes(key))]
        words += [name_bytes(key), len(rows)]
        for (model, end_user), numbers in rows.items():
            words += [name_bytes(model), name_bytes(end_user), " ".join(map(str, numbers))]
    for token, charge in batch.charges.items():
        names.append(account_name(name_bytes(token)))
        words += [charge.period, charge.spend, charge.tokens, len(charge.held)]
        for held_on, amounts in charge.held.items():
            words += [held_on, *amounts]
    return names, words


def _words(values: Sequence[Any]) -> list[bytes]:
    return [value if isinstance(value, bytes) else str(value).encode() for value in values]


def _rows(text: bytes) -> list[dict[str, str]]:
    """Return row → numbers, of each hash that :data:`SUMS` answers."""
    try:
        # Lua's empty list is an object to JSON.
        return [dict(zip(rows[::2], rows[1::2], strict=True)) if rows else {} for rows in json.loads(text)]
    except ValueError as error:
        raise _foreign(error) from error


def _sum_up(summing: Summing, day: str, key: bytes, rows: Mapping[str, str]) -> None:
    try:
        for row, numbers in rows.items():
            length, _, rest = row.partition(":")
            names = name_bytes(rest)
            model, end_user = names[: int(length)], names[int(length) :]
            summing.add(day, name_text(key), name_text(model), name_text(end_user), map(int, numbers.split()))
    except ValueError as error:
        raise _foreign(error) from error


def _foreign(error: ValueError) -> StoreUnavailable:
    return StoreUnavailable(f"it holds something else than sums: {error}")
