"""Sums of usage as values: what may be asked for, and what is answered. Pure."""

from typing import Final, Literal, get_args

from attrs import frozen

GroupBy = Literal["day", "key", "model", "end_user"]
GROUPS: Final[tuple[GroupBy, ...]] = get_args(GroupBy)


@frozen(kw_only=True)
class UsageQuery:
    """Which sums are wanted; ``None`` asks for nothing special.

    :ivar since: the first day (UTC, ``2026-11-26``), ``until``: the last, both included.
    :ivar group_by: each once, in the order of the answer's groups; empty: one sum of all.
    """

    since: str
    until: str
    key: str | None = None
    model: str | None = None
    end_user: str | None = None
    group_by: tuple[GroupBy, ...] = ()


@frozen(kw_only=True)
class UsageSum:
    """One sum.

    :ivar group: a text for each of the query's ``group_by``.
    :ivar requests: how many were forwarded; ``estimated`` of them have tokens that were counted from events or
        estimated, and ``unknown`` have used some that nobody could read.
    :ivar spend: money in micro-units.
    """

    group: tuple[str, ...] = ()
    requests: int = 0
    estimated: int = 0
    unknown: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    audio_ms: int = 0
    spend: int = 0


#: The names of the numbers in a sum.
NUMBERS: Final = (
    "requests",
    "estimated",
    "unknown",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "audio_ms",
    "spend",
)


@frozen
class Account:
    """What a virtual key has spent in its budget's period.

    :ivar period: when the period began, whole seconds since the epoch; 0 for a budget that is never renewed.
    :ivar spend: money in micro-units, and ``tokens``: of all requests that are over and written down.
    """

    period: int = 0
    spend: int = 0
    tokens: int = 0


NO_ACCOUNT: Final = Account()


@frozen
class Spent:
    """What somebody says that a key has spent.

    :ivar period: the period of its budget that it is now, as in :class:`Account`.
    :ivar money: in micro-units.
    """

    period: int
    money: int

    def applied(self, account: Account) -> Account:
        """Return what ``account`` becomes. The tokens of that period stay, but for no money: who has spent nothing has
        used none."""
        return Account(self.period, self.money, account.tokens if self.money and self.period == account.period else 0)
