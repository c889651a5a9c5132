"""Reservations made before the requests that take them, so that those need not wait for a store that is not here.

Nothing is given away that was not reserved: each request takes one whole reservation, made for it or ahead of it. One
made ahead is given back when nobody has taken it for :data:`AHEAD` seconds. There are some for a key that is asked for
again and again, while its limits are far away, so that what nobody takes is no reason to refuse anybody.
"""

from collections import deque
from collections.abc import Sequence
from typing import Final, Literal

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from vllmproxy.deadlines import Deadlines
from vllmproxy.ids import fresh_id
from vllmproxy.limits.behind import Behind, Shared
from vllmproxy.limits.values import BUDGETS, MAX_AMOUNT, Ask, Denied, Granted, Lot, Rule
from vllmproxy.store.interface import StoreUnavailable

_log = Logger(namespace=__name__)

#: Seconds for which a reservation may wait for a request.
AHEAD: Final = 0.5
#: The most that wait for one key, which are one reservation like fewer of them.
MOST: Final = 1024
#: Seconds that they should do for: each call holds up whatever else is done then.
_FILLING: Final = 0.1
#: They take no more than this part of what is left, and there are none where less than half of a limit is left.
_PART: Final = 32
#: What one request takes more of than another, as it is expected to use more.
_GUESSED: Final = BUDGETS | {"tokens"}


class Ahead:
    """The :class:`~vllmproxy.limits.interface.Limiter` that asks another one, ahead where that is worth it.

    :param limiter: whose store is somewhere else.
    """

    def __init__(self, limiter: Shared, clock: IReactorTime) -> None:
        self._limiter = limiter
        self._behind = Behind(limiter, clock)
        self._clock = clock
        self._stocks: dict[str, _Stock] = {}
        self._untouched: Deadlines[str] = Deadlines(clock, AHEAD, self._refresh)
        #: Calls that ask for more: the key, for which stock, how many, since when.
        self._asking: dict[Deferred[Lot], tuple[str, _Stock, int, float]] = {}
        self._closed = False

    def reserve(self, ask: Ask) -> Granted | Denied | Deferred[Granted | Denied]:
        stock = self._stocks.get(ask.key)
        if stock is not None and stock.ready and ask.ahead:
            now = self._clock.seconds()
            if not 0 <= now - stock.ready[0][0] < AHEAD:
                self._behind.give_back(ask.key, stock.spoilt(now))
            if stock.ready and stock.fit(ask.rules) == "fits":
                made = stock.take()
                self._fill_soon(ask.key, stock, now)
                return made
        return self._ask(ask)

    def settle(self, key: str, request_id: str, costs: tuple[int | None, ...]) -> None:
        stock = self._stocks.get(key)
        self._behind.settle(key, request_id, costs, prompt=stock is None or not stock.most)

    def renew(self, key: str, request_ids: Sequence[str]) -> list[str] | Deferred[list[str]]:
        return self._limiter.renew(key, request_ids)

    async def finish(self) -> None:
        self._closed = True
        for key in list(self._stocks):
            self._drop(key)
        self._untouched.close()
        await DeferredList(list(self._asking))  # what these make is given back
        await self._behind.finish()

    def _ask(self, ask: Ask, *, again: bool = True) -> Granted | Denied | Deferred[Granted | Denied]:
        self._behind.tell(ask.key)
        stock = self._stocks.get(ask.key) if again else None
        held = () if stock is None else stock.held
        decision = self._limiter.reserve(ask)
        return decision.addCallback(self._decided, ask, held) if isinstance(decision, Deferred) else decision

    def _decided(
        self, decision: Granted | Denied, ask: Ask, held: tuple[tuple[Rule, int], ...]
    ) -> Granted | Denied | Deferred[Granted | Denied]:
        """A request has waited for this.

        :param held: of what was reserved here for nobody when it was asked for, each rule and how much. Where it is
            refused only because of that, it is asked for once more.
        """
        stock = self._stocks.get(ask.key)
        if isinstance(decision, Denied):
            self._drop(ask.key)
            rule = ask.rules[decision.rule]
            here = sum(amount for ours, amount in held if (ours.kind, ours.scope) == (rule.kind, rule.scope))
            return self._ask(ask, again=False) if here and decision.left + here >= rule.needed else decision
        if not ask.ahead:
            return decision
        if stock is None or (fit := stock.fit(ask.rules)) == "not":
            self._drop(ask.key)
            if not self._closed:  # else nobody would give it back
                self._stocks[ask.key] = _Stock(ask.rules, stock)
                self._untouched.set(ask.key)
        elif fit == "fits":
            stock.left(decision.remaining)
            stock.taken += 1
            stock.size = min(stock.size + 1, MOST)
            self._fill_soon(ask.key, stock, self._clock.seconds())
        return decision

    def _fill_soon(self, key: str, stock: "_Stock", now: float) -> None:
        """Ask for more when all is done that is to be done for a request, if a good part is missing, or what there is
        will soon have waited for too long."""
        if not stock.is_due and (stock.is_low or now - stock.filled > AHEAD / 2):
            stock.is_due = True
            self._clock.callLater(0, self._fill, key, stock)

    def _fill(self, key: str, stock: "_Stock") -> None:
        stock.is_due = False
        if self._stocks.get(key) is not stock:
            return
        now = self._clock.seconds()
        if now < stock.filled + _FILLING:
            stock.grow()
        stock.filled = now
        stock.taken = 0
        missing = stock.missing
        if missing <= 0:  # little is left by now
            return
        self._untouched.set(key)
        self._behind.tell(key)  # a store that is busy anyway is so for a little longer
        stock.asked += missing
        asked = self._limiter.reserve_ahead(key, stock.rules, fresh_id().decode("ascii"), missing, AHEAD)
        self._asking[asked] = key, stock, missing, now
        asked.addCallbacks(self._made, self._not_made, (asked,), errbackArgs=(asked,))
        asked.addErrback(_failed)

    def _made(self, lot: Lot, asked: Deferred[Lot]) -> None:
        key, stock, count, at = self._asking.pop(asked)
        stock.asked -= count
        if self._stocks.get(key) is not stock:
            self._behind.give_back(key, [lot])
        elif lot.granted:
            stock.left(lot.remaining)
            stock.add(at, lot)
        if lot.granted < count:
            self._drop(key)

    def _not_made(self, reason: Failure, asked: Deferred[Lot]) -> None:
        key, stock, count, _ = self._asking.pop(asked)
        stock.asked -= count
        self._drop(key)
        reason.trap(StoreUnavailable)  # whose request asks next, hears of it

    def _refresh(self, key: str) -> None:
        """No more was asked for in a while. What is ahead is given back, and as many made anew as were taken meanwhile:
        some ask many times at once, and then wait."""
        stock = self._stocks[key]
        self._behind.give_back(key, stock.all())
        stock.size = min(stock.taken, MOST)
        if stock.missing > 0:
            self._fill(key, stock)
        else:
            self._drop(key)

    def _drop(self, key: str) -> None:
        """Nobody has asked for this key for a while, or others need what is left."""
        self._untouched.clear(key)
        stock = self._stocks.pop(key, None)
        if stock is not None:
            self._behind.give_back(key, stock.all())


class _Stock:
    """What is reserved for the next requests of one key.

    :param rules: what a request asks for.
    :param before: the stock that did not do for it. Costs are powers of two, so that most requests find theirs.
    :ivar size: how many it should be, as far as the limits afford that.
    :ivar ready: when each lot was asked for, oldest first; none of them is used up. :ivar here: how many requests they
        do for.
    :ivar most: how many the limits afford; 0 where they are not far away.
    :ivar asked: how many are on their way. :ivar is_due: whether more are about to be asked for.
    :ivar filled: when some were asked for last. :ivar taken: how many requests came since.
    """

    __slots__ = ("asked", "filled", "here", "is_due", "most", "ready", "rules", "size", "taken")

    def __init__(self, rules: tuple[Rule, ...], before: "_Stock | None") -> None:
        self.rules = tuple(map(_rounded, rules))
        self.size = 1
        if before is not None and _limits(before.rules) == _limits(rules):
            pairs = zip(before.rules, self.rules, strict=True)
            self.rules = tuple(old if new.cost < old.cost <= _next_to_nothing(old) else new for old, new in pairs)
            self.size = before.size
        self.ready: deque[tuple[float, Lot]] = deque()
        self.here = 0
        self.asked = 0
        self.is_due = False
        self.filled = 0.0
        self.taken = 0
        self.most = 0

    def fit(self, rules: tuple[Rule, ...]) -> Literal["fits", "too much", "not"]:
        """Tell whether what is reserved here will do, and is not far too much."""
        if len(rules) != len(self.rules):
            return "not"
        found: Literal["fits", "too much"] = "fits"
        for place, ours in enumerate(self.rules):
            theirs = rules[place]
            if theirs is ours:
                continue
            if (
                theirs.cost > ours.cost
                or theirs.limit != ours.limit
                or theirs.kind != ours.kind
                or theirs.scope != ours.scope
                or theirs.period != ours.period
            ):
                return "not"
            if ours.cost > 2 * theirs.cost and ours.cost > _next_to_nothing(ours):
                found = "too much"
        return found

    def add(self, at: float, lot: Lot) -> None:
        """It was asked for then."""
        self.ready.append((at, lot))
        self.here += lot.left

    def take(self) -> Granted:
        """A request has come, and takes one of what is here."""
        lot = self.ready[0][1]
        made = lot.take()
        if lot.used == lot.granted:
            self.ready.popleft()
        self.here -= 1
        self.taken += 1
        return made

    def all(self) -> list[Lot]:
        """Take all out."""
        out = [lot for _, lot in self.ready]
        self.ready.clear()
        self.here = 0
        return out

    def spoilt(self, now: float) -> list[Lot]:
        """Take out what has waited for too long: there was too much of it. Or the clock was set back."""
        out = []
        while self.ready and not 0 <= now - self.ready[0][0] < AHEAD:
            lot = self.ready.popleft()[1]
            self.here -= lot.left
            self.size = max(self.size - lot.left, 1)
            out.append(lot)
        if not self.ready:  # who takes them out waits, and makes it grow again
            self.size = max(self.size // 2, 1)
        return out

    @property
    def held(self) -> tuple[tuple[Rule, int], ...]:
        """Each rule, and how much of it is reserved here, or asked for: what was asked for first is taken first."""
        count = self.here + self.asked
        return tuple([(rule, count * rule.cost) for rule in self.rules]) if count else ()

    def grow(self) -> None:
        """Requests would soon find nothing here."""
        self.size = min(2 * self.size, MOST)

    def left(self, remaining: tuple[int, ...]) -> None:
        """So much was left of each limit just now: no more than a small part of that may be here."""
        self.most = MOST
        for rule, left in zip(self.rules, remaining, strict=True):
            self.most = min(self.most, left // (_PART * (rule.cost or 1)) if 2 * left >= rule.limit else 0)

    @property
    def is_low(self) -> bool:
        """Whether half of it is missing: a store needs as long for many as for few."""
        wanted = min(self.size, self.most)
        return wanted - self.here - self.asked >= max(1, wanted // 2)

    @property
    def missing(self) -> int:
        """How many are to be asked for."""
        return min(self.size, self.most) - self.here - self.asked


def _rounded(rule: Rule) -> Rule:
    if rule.kind not in _GUESSED or not rule.cost:
        return rule
    cost = min(1 << (rule.cost - 1).bit_length(), MAX_AMOUNT)
    return Rule(rule.kind, rule.scope, rule.limit, cost, rule.period)


def _next_to_nothing(rule: Rule) -> int:
    """Return what may be taken of a limit for nothing, until a request has ended."""
    return rule.limit // 1024


def _limits(rules: tuple[Rule, ...]) -> list[tuple[str, str, int, int]]:
    return [(rule.kind, rule.scope, rule.limit, rule.period) for rule in rules]


def _failed(reason: Failure) -> None:
    _log.failure("Reserving ahead failed", reason)
