"""What is asked of the limits and what they answer."""

from operator import sub
from typing import Final, Literal

from attrs import define, field, frozen

Kind = Literal["requests", "tokens", "max_parallel_requests", "budget", "budget_tokens"]

#: Kinds that are counted in a key's account, in periods, and not in a window.
BUDGETS: Final = frozenset[Kind]({"budget", "budget_tokens"})

#: The largest limit and cost. Thousands of them add up exactly in the doubles that Redis's Lua counts with.
MAX_AMOUNT: Final = 2**40

#: Seconds after which to try again when all places of ``max_parallel_requests`` are taken: nobody knows when one
#: of those requests ends.
BUSY_RETRY_AFTER: Final = 1.0


class DuplicateRequest(Exception):
    """That request id has been used already: nothing was taken. Ids are the proxy's own, never the client's."""


@frozen
class Rule:
    """One limit, and what one request takes of it.

    :ivar kind: ``requests`` and ``tokens`` are counted in the sliding window, ``max_parallel_requests`` while they run,
        ``budget`` (micro-units of money) and ``budget_tokens`` in a period.
    :ivar scope: ``""`` for the whole key, else the model that the limit is for.
    :ivar limit: how much there is.
    :ivar cost: how much this request takes: 1, or for tokens and money what it is expected to use.
    :ivar period: of a budget: when its period began, whole seconds since the epoch.
    :ivar least: what will do where that much is not left: then all that is left is taken. ``None``: ``cost``.
    """

    kind: Kind
    scope: str
    limit: int
    cost: int
    period: int = 0
    least: int | None = None

    @property
    def needed(self) -> int:
        """What has to be left."""
        return self.cost if self.least is None else min(self.least, self.cost)

    def taken(self, left: int) -> int:
        """Return what is taken where ``left`` is left, which is enough."""
        return self.cost if self.least is None else min(self.cost, max(left, self.needed))

    def __attrs_post_init__(self) -> None:
        if not (0 <= self.limit <= MAX_AMOUNT and 0 <= self.cost <= MAX_AMOUNT):
            raise ValueError(f"a limit and a cost must be from 0 to {MAX_AMOUNT}")
        if self.kind == "max_parallel_requests" and self.cost != 1:
            raise ValueError("a request takes one place of max_parallel_requests")
        if self.kind in BUDGETS and self.scope:
            raise ValueError("a budget is for the whole key")


@define  # not frozen, which takes longer to make: there is one for each request, and of what it is granted
class Ask:
    """All that one request takes, of one key's limits.

    :ivar key: the key's token (sha256 hex).
    :ivar request_id: names the request ever after; unique, and made by the proxy.
    :ivar rules: no two for the same limit, which is a kind and a scope.
    :ivar ahead: whether what was reserved before anybody asked will do, and more may be for the next.
    """

    key: str
    request_id: str
    rules: tuple[Rule, ...]
    ahead: bool = True


@define  # as above
class Granted:
    """All was taken.

    :ivar remaining: for each rule of the ask, what is left of it now; never negative. Of a budget: what is neither
        spent nor held.
    :ivar taken: for each rule, what was taken.
    :ivar request_id: under which it was taken, where that is not the ask's: it was reserved before somebody asked.
    :ivar day: of a budget: on which day it is held, days since the epoch, where the store goes by days.
    """

    remaining: tuple[int, ...]
    taken: tuple[int, ...] = field(default=(), eq=False)
    request_id: str = field(default="", eq=False)
    day: int = field(default=0, eq=False)


class Lot:
    """What was granted to several requests that are alike, and are to come; each takes a part of its own.

    :param name: under which it was taken; a part's request id is ``NAME:0``, ``NAME:1`` ….
    :param remaining: as of :class:`Granted`, when all of them have come.
    :ivar granted: to how many. :ivar used: how many have come.
    """

    __slots__ = ("_left", "day", "granted", "name", "remaining", "taken", "used")

    def __init__(
        self, name: str, granted: int, remaining: tuple[int, ...] = (), taken: tuple[int, ...] = (), day: int = 0
    ) -> None:
        self.name = name
        self.granted = granted
        self.used = 0
        self.remaining = remaining
        self.taken = taken
        self.day = day
        #: What is left of each rule before the next of them comes.
        self._left = tuple([left + granted * cost for left, cost in zip(remaining, taken, strict=True)])

    @property
    def left(self) -> int:
        """How many may come."""
        return self.granted - self.used

    def take(self) -> Granted:
        """Return what the next of them was granted, as if one after the other had asked."""
        self._left = tuple(map(sub, self._left, self.taken))
        part = Granted(self._left, self.taken, f"{self.name}:{self.used}", self.day)
        self.used += 1
        return part


@frozen
class Denied:
    """Nothing was taken.

    :ivar rule: which rule of the ask (its place): of those that refuse, the one that takes the longest to have room.
    :ivar retry_after: seconds until that rule has room, if nobody takes or gives back meanwhile.
    :ivar reset_at: when that is, in seconds since the epoch on the clock of the store.
    :ivar left: how much of it is left, which is too little. Where the whole limit is, that may be told.
    :ivar never: waiting does not help: the request costs more than the limit is, or than is left of a budget.
    """

    rule: int
    retry_after: float
    reset_at: float
    never: bool = False
    left: int = field(default=0, eq=False)
