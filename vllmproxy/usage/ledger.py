"""Adding usage up: what a batch of events changes, and what comes of it. Pure; every store does it by this."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, timedelta
from operator import add, attrgetter
from typing import Any, Final

from attrs import field, frozen

from vllmproxy.limits.values import MAX_AMOUNT
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.sums import NUMBERS, Account, UsageQuery, UsageSum

#: Days that sums are kept for.
KEPT_DAYS: Final = 400
#: Clients name end users, so only so many of one key and day have sums of their own, as have models …
MOST_END_USERS: Final = 1000
MOST_MODELS: Final = 200
#: … and all further ones have them under this name.
OTHER: Final = "(other)"

#: Groups that one query may have.
MOST_GROUPS: Final = 10_000

#: A sum's numbers, in the order of :data:`~vllmproxy.usage.sums.NUMBERS`.
Numbers = tuple[int, ...]
NOTHING: Final[Numbers] = (0,) * len(NUMBERS)

_name_of: Final = attrgetter("key", "model", "end_user", "quality", "period", "held_on")
_numbers_of: Final = attrgetter(
    "requests", "prompt_tokens", "completion_tokens", "cached_tokens", "audio_ms", "spend", "held", "held_tokens"
)


class TooManySums(Exception):
    """The query has more than ``MOST_GROUPS`` groups; ask for fewer days, or group by less."""


@frozen
class Charge:
    """What a batch does to one account.

    :ivar period: the latest of its events' periods; all else is what those of that period add up to.
    :ivar held: day on which it was held (``held_on``) → how much of money and of tokens.
    """

    period: int
    spend: int = 0
    tokens: int = 0
    held: Mapping[int, tuple[int, int]] = field(factory=dict)

    def joined(self, other: "Charge") -> "Charge":
        """Return what both do; that of the later period, where these are not the same."""
        if self.period != other.period:
            return max(self, other, key=attrgetter("period"))
        held = dict(self.held)
        for day, amounts in other.held.items():
            money, tokens = held.get(day, (0, 0))
            held[day] = money + amounts[0], tokens + amounts[1]
        return Charge(self.period, self.spend + other.spend, self.tokens + other.tokens, held)

    def applied(self, account: Account) -> Account:
        """Return what ``account`` becomes: begun anew if its period is older, as it is if that is newer."""
        if self.period < account.period:
            return account
        if self.period > account.period:
            return Account(self.period, self.spend, self.tokens)
        return Account(self.period, account.spend + self.spend, account.tokens + self.tokens)


@frozen
class Batch:
    """What some events add up to.

    :ivar sums: (day, key) → (model, end user) → numbers.
    :ivar charges: token → what its account is charged; in any order the same comes out as with event by event.
    """

    sums: Mapping[tuple[str, str], Mapping[tuple[str, str], Numbers]]
    charges: Mapping[str, Charge]


class Tally:
    """Adds events up as they come, when they are at hand anyway; what they add up to does not depend on their order.

    Those that are alike in all but their numbers are added up together, in few steps for each.

    :ivar count: of how many events.
    """

    def __init__(self) -> None:
        self.count = 0
        self._alike: dict[tuple[Any, ...], list[Numbers]] = {}
        self._firsts: dict[tuple[Any, ...], UsageEvent] = {}

    def add(self, events: Sequence[UsageEvent]) -> None:
        """Add some more."""
        self.count += len(events)
        for event in events:
            name = (event.time // 86_400, event.requests > 0, *_name_of(event))
            numbers = self._alike.get(name)
            if numbers is None:
                self._alike[name] = [_numbers_of(event)]
                self._firsts[name] = event
            else:
                numbers.append(_numbers_of(event))

    @property
    def unlike(self) -> int:
        """In how many parts a store adds them, at most."""
        return len(self._alike)

    def batch(self) -> Batch:
        """Return what they add up to; a number beyond ``MAX_AMOUNT`` counts as that, a negative one as nothing."""
        sums: dict[tuple[str, str], dict[tuple[str, str], Numbers]] = {}
        charges: dict[str, Charge] = {}
        for name, each in self._alike.items():
            first, (_, is_counted, key, model, end_user, quality, period, held_on) = self._firsts[name], name
            requests, prompt, completion, cached, audio_ms, spend, held, held_tokens = _added_up(each)
            if is_counted:
                estimated, unknown = requests * (quality == "estimated"), requests * (quality == "unknown")
                row = (requests, estimated, unknown, prompt, completion, cached, audio_ms, spend)
                rows = sums.setdefault((first.day, key), {})
                rows[model, end_user] = added(rows.get((model, end_user), NOTHING), row)
            if first.is_of_virtual_key:
                holds = {held_on: (held, held_tokens)} if held or held_tokens else {}
                charge, before = Charge(period, spend, prompt + completion, holds), charges.get(key)
                charges[key] = charge if before is None else before.joined(charge)
        return Batch(sums, charges)


def batch_of(events: Sequence[UsageEvent], tally: Tally | None = None) -> Batch:
    """Return what ``events`` add up to.

    :param tally: of these, or of more before them: then it is of no use.
    """
    if tally is None or tally.count != len(events):
        tally = Tally()
        tally.add(events)
    return tally.batch()


def added(numbers: Iterable[int], more: Iterable[int]) -> Numbers:
    """Return the sum of two sums' numbers."""
    return tuple(map(add, numbers, more))


def unseen(first: int, events: Sequence[UsageEvent], last: int) -> Sequence[UsageEvent]:
    """Return those of ``events``, numbered from ``first``, whose numbers are above ``last``."""
    return events[max(0, last + 1 - first) :]


def days_of(query: UsageQuery) -> list[str]:
    """Return the days that ``query`` asks for, in order; the last ``KEPT_DAYS`` of them if they are more."""
    until = date.fromisoformat(query.until)
    count = min((until - date.fromisoformat(query.since)).days + 1, KEPT_DAYS)
    return [str(until - timedelta(days=back)) for back in range(count - 1, -1, -1)]


def oldest_kept(today: str) -> str:
    """Return the first day whose sums are kept on the day ``today``."""
    return str(date.fromisoformat(today) - timedelta(days=KEPT_DAYS - 1))


class Summing:
    """Adds up rows into the groups that a query asks for; rows that it does not ask for are passed over."""

    def __init__(self, query: UsageQuery) -> None:
        self._query = query
        self._sums: dict[tuple[str, ...], Numbers] = {}

    def add(self, day: str, key: str, model: str, end_user: str, numbers: Iterable[int]) -> None:
        """Add the row of that day, key, model and end user.

        :raises TooManySums: there would be more groups than a query may have.
        :raises ValueError: these are not a sum's numbers.
        """
        numbers = tuple(numbers)
        if len(numbers) != len(NUMBERS):
            raise ValueError("a sum has other numbers")
        query = self._query
        wanted = ((query.key, key), (query.model, model), (query.end_user, end_user))
        if not query.since <= day <= query.until or any(asked not in (None, found) for asked, found in wanted):
            return
        names = {"day": day, "key": key, "model": model, "end_user": end_user}
        group = tuple(names[name] for name in query.group_by)
        self._sums[group] = added(self._sums.get(group, NOTHING), numbers)
        if len(self._sums) > MOST_GROUPS:
            raise TooManySums

    def result(self) -> list[UsageSum]:
        """Return the sums so far, in the order of their groups."""
        return [sum_of(group, self._sums[group]) for group in sorted(self._sums)]


def sum_of(group: tuple[str, ...], numbers: Iterable[int]) -> UsageSum:
    """Return the sum of that group with these numbers."""
    return UsageSum(group=group, **dict(zip(NUMBERS, numbers, strict=True)))


def _added_up(rows: list[Numbers]) -> Numbers:
    if min(map(min, rows)) < 0 or max(map(max, rows)) > MAX_AMOUNT:
        rows = [tuple([min(max(number, 0), MAX_AMOUNT) for number in row]) for row in rows]
    return tuple(map(sum, zip(*rows, strict=True)))
