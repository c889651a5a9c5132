"""The limits that several proxies share, in Redis (6.2 or newer) or Valkey.

What is kept, all of it but the account with a time to live, and all of a key under one hash tag::

    vllmproxy:{TOKEN}:clock                               steady time, see vllmproxy.limits.steady
    vllmproxy:{TOKEN}:requests:MODEL                      a window; no MODEL: of the whole key
    vllmproxy:{TOKEN}:tokens:MODEL                        a window
    vllmproxy:{TOKEN}:places:MODEL                        who holds places of max_parallel_requests
    vllmproxy:{TOKEN}:request:ID                          what was taken for a request, or for several that are alike
    vllmproxy:{TOKEN}:budget                              the account, for as long as there is the key
"""

from collections.abc import Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from txredisapi import RedisError

from vllmproxy.limits.accounts import has_budget
from vllmproxy.limits.behind import HELD, SELDOM, Settlement
from vllmproxy.limits.spans import Spans, micros
from vllmproxy.limits.values import (
    BUDGETS,
    BUSY_RETRY_AFTER,
    MAX_AMOUNT,
    Ask,
    Denied,
    DuplicateRequest,
    Granted,
    Lot,
    Rule,
)
from vllmproxy.limits.window import bucket_width
from vllmproxy.store.calls import Calls
from vllmproxy.store.gathering import Gathering
from vllmproxy.store.interface import StoreUnavailable
from vllmproxy.store.limits_lua import DUPLICATE, REFUSED, RESERVE
from vllmproxy.store.link import Link, Wire
from vllmproxy.store.rows import name_bytes
from vllmproxy.store.scripts import LATE, ScriptCall, Scripts
from vllmproxy.store.settling_lua import RENEW, SETTLE

#: Milliseconds that a time to live is longer than it must be: Redis counts it in milliseconds, and from its start.
_MARGIN = 1000
#: Seconds before the second try to give back what was taken unheard, when the connection is lost; longer than a call
#: may take. Each pause is twice the last.
_UNDO_SECONDS = 1.0


class RedisLimiter:
    """The :class:`~vllmproxy.limits.behind.Shared` on a connection to Redis, one round trip a call.

    :param link: the connection; whoever made it opens and closes it.
    :param window: seconds of the sliding window; the same on all proxies that share a Redis, as is ``lease``.
    :param lease: seconds of a lease; renew it three times as often.
    :param timeout: seconds that a call may take.
    """

    def __init__(
        self, link: Link, clock: IReactorTime, *, window: float = 60.0, lease: float = 45.0, timeout: float = 0.2
    ) -> None:
        self._clock = clock
        self._spans = Spans.of(window, lease)
        self._kept = self._spans.kept // 1000 + _MARGIN
        width = bucket_width(self._spans.window)
        lengths = (self._spans.window, width, self._spans.lease, micros(BUSY_RETRY_AFTER), self._kept)
        self._lengths = [b"%d" % length for length in lengths]
        self._memory = b"%d" % (self._spans.memory // 1000)
        self._calls = Calls(clock)
        self._scripts = Scripts(link, clock, timeout)
        self._reserving: Gathering[_Reserve] = Gathering(self._send_reserves)
        self._closed = False

    def close(self) -> None:
        """Fail every call under way."""
        self._closed = True
        self._calls.end()
        self._scripts.end()

    def reserve(self, ask: Ask) -> Granted | Denied | Deferred[Granted | Denied]:
        if not ask.rules:
            return Granted(())
        asked = _Reserve(ask)
        self._reserving.add(asked)
        return asked.decided

    def reserve_ahead(self, key: str, rules: tuple[Rule, ...], name: str, count: int, ahead: float) -> Deferred[Lot]:
        reservation = name_bytes(name)
        counters, text = _counted(name_bytes(key), rules)
        names = [_name(key, b"clock"), _name(key, b"request", reservation), *counters]
        words = [*self._lengths, b"%d" % micros(ahead), reservation, b"%d" % count, text]
        call = self._scripts.call(RESERVE, names, words)
        wanted = Lot(name, count)
        reserved: Deferred[Any] = self._scripts.run(call)
        return reserved.addCallbacks(
            self._reserved_ahead,
            self._not_reserved_ahead,
            (key, rules, wanted),
            errbackArgs=(key, rules, wanted, call),
        )

    def _reserved_ahead(self, reply: list[Any], key: str, rules: tuple[Rule, ...], wanted: Lot) -> Lot:
        decision = _decision(len(rules), reply[2] if len(reply) > 2 else None, reply[1])
        if isinstance(decision, Granted):
            count = min(reply[2][0], wanted.granted)
            return Lot(wanted.name, count, decision.remaining, decision.taken, decision.day)
        if decision is None:
            Deferred.fromCoroutine(self._give_back(_asks_of(key, rules, wanted)))
        return Lot(wanted.name, 0)

    def _not_reserved_ahead(
        self, reason: Failure, key: str, rules: tuple[Rule, ...], wanted: Lot, call: ScriptCall
    ) -> Failure:
        if call.wire is not None:
            Deferred.fromCoroutine(self._undo(_asks_of(key, rules, wanted), call.wire))
        return reason

    def settle_all(self, settlements: Sequence[Settlement]) -> Deferred[None]:
        told: Deferred[Any] = self._scripts.run(self._settling(settlements))
        return told.addCallback(lambda _: None)

    def _settling(self, settlements: Sequence[Settlement], seconds: float | None = None) -> ScriptCall:
        together: dict[tuple[str, bytes], list[tuple[int, tuple[int | None, ...]]]] = {}
        for key, request_id, costs in settlements:
            reservation, unit = _place_of(request_id)
            together.setdefault((key, reservation), []).append((unit, costs))
        names, words = [], [self._memory]
        for (key, reservation), settled in together.items():
            names.append(_name(key, b"request", reservation))
            words += reservation, _used(*zip(*settled, strict=True))
        return self._scripts.call(SETTLE, names, words, seconds)

    def _send_reserves(self, asked: list["_Reserve"]) -> None:
        asked = [each for each in asked if not each.decided.called]  # somebody may have given up meanwhile
        if not asked:
            self._reserving.done()
            return
        names: list[bytes] = []
        words = [*self._lengths, b"0"]
        for each in asked:
            each.add_to(names, words)
        call = self._scripts.call(RESERVE, names, words)
        self._scripts.run(call).addCallbacks(
            self._reserved, self._not_reserved, callbackArgs=(asked,), errbackArgs=(asked, call)
        )

    def _reserved(self, reply: list[Any], asked: list["_Reserve"]) -> None:
        self._reserving.done()
        answers = [
            _decision(len(each.ask.rules), answer, reply[1]) for each, answer in zip(asked, reply[2:], strict=False)
        ]
        decided = list(zip_longest(asked, answers))
        # Nobody waits for it any more, or knows what it says.
        self._not_wanted([each for each, decision in decided if each.decided.called or decision is None])
        waiting = [(each, decision) for each, decision in decided if not each.decided.called]
        given_up = []
        for each, decision in waiting:
            if each.decided.called:  # because of what another one was granted
                given_up.append(each)
            else:
                each.decided.callback(_NONSENSE if decision is None else decision)
        self._not_wanted(given_up)

    def _not_wanted(self, asked: list["_Reserve"]) -> None:
        if asked:
            Deferred.fromCoroutine(self._give_back([each.ask for each in asked]))

    def _not_reserved(self, reason: Failure, asked: list["_Reserve"], call: ScriptCall) -> None:
        """Nobody heard what came of it, and nobody will."""
        waiting = self._reserving.drop()
        if call.wire is not None:
            Deferred.fromCoroutine(self._undo([each.ask for each in asked], call.wire))
        for each in (*asked, *waiting):
            if not each.decided.called:
                each.decided.errback(reason)

    async def _give_back(self, asked: Sequence[Ask]) -> None:
        """Say that they are not wanted, as long as Redis remembers one."""
        settlements = list(map(_nothing_used, asked))
        until = self._clock.seconds() + (HELD if any(map(has_budget, asked)) else self._spans.kept / 1e6)
        pause = _UNDO_SECONDS
        while not self._closed and self._clock.seconds() < until:
            try:
                await self.settle_all(settlements)
                return
            except StoreUnavailable:
                pass
            with suppress(StoreUnavailable):
                await self._calls.run(deferLater(self._clock, pause), 2 * pause)
            pause = min(2 * pause, SELDOM)

    def renew(self, key: str, request_ids: Sequence[str]) -> list[str] | Deferred[list[str]]:
        if not request_ids:
            return []
        names, words = [_name(key, b"clock")], [b"%d" % self._spans.lease, b"%d" % self._kept]
        for request_id in request_ids:
            reservation, unit = _place_of(request_id)
            names.append(_name(key, b"request", reservation))
            words += reservation, b"%d" % unit
        lost = self._scripts.run(self._scripts.call(RENEW, names, words))
        return lost.addCallback(lambda reply: [request_ids[place] for place in reply[2:]])

    async def _undo(self, asked: Sequence[Ask], wire: Wire) -> None:
        """Give back what reservations may have taken whose answer nobody got; see :class:`Limiter`.

        Redis runs what comes over one connection in order, and one that stays mute is dropped. If it is lost, what is
        held of a budget would not leave by itself: it is said over the next one, while Redis remembers the reservation.
        """
        reply: Deferred[Any] = Deferred()
        settlements = list(map(_nothing_used, asked))
        self._settling(settlements, self._spans.kept / 1e6).send(wire, reply.callback)
        try:
            answer: Any = await reply
            if isinstance(answer, list) and answer[0] != LATE:
                return
        except RedisError:
            pass
        await self._give_back(asked)


def _nothing_used(ask: Ask) -> Settlement:
    return ask.key, ask.request_id, (0,) * len(ask.rules)


class _Reserve:
    """A reservation that is asked for."""

    __slots__ = ("ask", "decided")

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.decided: Deferred[Granted | Denied] = Deferred()

    def add_to(self, names: list[bytes], words: list[bytes]) -> None:
        """Add what :data:`RESERVE` wants of it."""
        key, id = name_bytes(self.ask.key), name_bytes(self.ask.request_id)
        counters, text = _counted(key, self.ask.rules)
        names += b"vllmproxy:{%b}:clock" % key, b"vllmproxy:{%b}:request:%b" % (key, id), *counters
        words += id, b"0", text


def _place_of(request_id: str) -> tuple[bytes, int]:
    """Return the name of the reservation that a request is of, and which of its units; -1: it is its only one's."""
    reservation, _, unit = name_bytes(request_id).partition(b":")
    return reservation, int(unit) if unit.isdigit() else -1


def _used(units: Sequence[int], costs: Sequence[tuple[int | None, ...]]) -> bytes:
    """Return what :data:`SETTLE` wants to know of units of one reservation."""
    lists = [str(list(units))]
    for of_rule in zip_longest(*costs):
        told: Sequence[int | None] = of_rule
        if told.count(None) == len(told):
            lists.append("false")
        else:
            lists.append(str([-1 if cost is None else min(max(cost, 0), MAX_AMOUNT) for cost in told]))
    return f"[{','.join(lists)}]".encode("ascii")


def _asks_of(key: str, rules: tuple[Rule, ...], wanted: Lot) -> list[Ask]:
    """Return what each of a lot's requests would have asked for."""
    return [Ask(key, f"{wanted.name}:{number}", rules) for number in range(wanted.granted)]


def _counted(key: bytes, rules: tuple[Rule, ...]) -> tuple[list[bytes], bytes]:
    """Return the names of what counts the rules, and what :data:`RESERVE` wants to know of them."""
    names, words = [], []
    for rule in rules:
        kind = rule.kind.encode()
        if rule.kind in BUDGETS:
            names.append(b"vllmproxy:{%b}:budget" % key)
        else:
            counter = b"places" if rule.kind == "max_parallel_requests" else kind
            names.append(b"vllmproxy:{%b}:%b:%b" % (key, counter, name_bytes(rule.scope)))
        words.append(b'"%b",%d,%d,%d,%d' % (kind, rule.limit, rule.cost, rule.period, rule.needed))
    return names, b"[%b]" % b",".join(words)


_NUMBERS: Final = frozenset({int})
#: What a reservation fails with whose answer cannot be read.
_NONSENSE: Final = Failure(StoreUnavailable("the Redis answered something else than a decision"))


def _decision(count: int, answer: Any, now: int) -> Granted | Denied | Failure | None:
    """Return what Redis decided of a request with so many rules; ``None`` where that cannot be read.

    :param now: the time on its clock, in microseconds.
    """
    try:
        what, *numbers = answer
        if what == DUPLICATE:
            return Failure(DuplicateRequest())
        if what > REFUSED:
            if len(numbers) != 2 * count + 1 or not _NUMBERS.issuperset(map(type, numbers)):
                return None
            return Granted(tuple(numbers[:count]), tuple(numbers[count:-1]), day=numbers[-1])
        place, wait, never, left = numbers
        return Denied(place, wait / 1e6, (now + wait) / 1e6, never=bool(never), left=left)
    except (TypeError, ValueError):
        return None


def _name(key: str, *parts: bytes) -> bytes:
    return b"vllmproxy:{%b}:%b" % (name_bytes(key), b":".join(parts))
