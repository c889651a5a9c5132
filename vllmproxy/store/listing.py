"""Which keys a listing shows, and in what order: the same in every store. Pure."""

from collections.abc import Iterable
from typing import Any, Final, Literal, get_args

from attrs import field, frozen

from vllmproxy.keys.key import VirtualKey

SortField = Literal["created_at", "updated_at", "expires", "key_alias", "key_name", "user_id", "team_id", "token"]
Status = Literal["active", "blocked", "expired"]
SORT_FIELDS: Final[tuple[str, ...]] = get_args(SortField)
STATUSES: Final[tuple[str, ...]] = get_args(Status)


@frozen(kw_only=True)
class KeyQuery:
    """Which keys are wanted; ``None`` asks for nothing special.

    :ivar offset: how many of them are skipped.
    :ivar limit: how many of them are returned at most.
    :ivar search: text in the alias, the name, the user's or the team's id, in any case, or the whole token.
    :ivar aliased: only those with an alias, which is all that ``search`` looks at.
    :ivar now: what ``status`` counts from, seconds since the epoch.
    """

    offset: int = 0
    limit: int = 10
    sort_by: SortField = "created_at"
    descending: bool = True
    token: str | None = None
    key_alias: str | None = None
    user_id: str | None = None
    team_id: str | None = None
    search: str | None = None
    status: Status | None = None
    aliased: bool = False
    now: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether it asks for all keys by the time of their making, which stores have an index of."""
        wanted = (self.token, self.key_alias, self.user_id, self.team_id, self.search, self.status)
        return self.sort_by == "created_at" and not self.aliased and all(each is None for each in wanted)

    def matches(self, key: VirtualKey) -> bool:
        """Tell whether ``key`` is one of them."""
        exact = (
            (self.token, key.token),
            (self.key_alias, key.key_alias),
            (self.user_id, key.user_id),
            (self.team_id, key.team_id),
            (self.status, status_of(key, self.now)),
        )
        if any(wanted is not None and wanted != is_ for wanted, is_ in exact):
            return False
        if self.aliased and key.key_alias is None:
            return False
        return self.search is None or self._finds(key, self.search)

    def _finds(self, key: VirtualKey, text: str) -> bool:
        places = [key.key_alias] if self.aliased else [key.key_alias, key.key_name, key.user_id, key.team_id]
        if text == key.token and not self.aliased:
            return True
        return any(place is not None and text.casefold() in place.casefold() for place in places)


@frozen
class KeyPage:
    """A part of a listing.

    :ivar total: how many keys the whole of it has.
    """

    keys: tuple[VirtualKey, ...]
    total: int


@frozen
class Selection:
    """The tokens of the keys that match, with what they are sorted by: small, however large the rows are."""

    query: KeyQuery
    _found: dict[str, Any] = field(factory=dict)

    def add(self, keys: Iterable[VirtualKey]) -> None:
        """Take those of ``keys`` that match; one that comes twice counts once."""
        for key in keys:
            if self.query.matches(key):
                self._found[key.token] = getattr(key, self.query.sort_by)

    def __len__(self) -> int:
        """Return how many match."""
        return len(self._found)

    def page(self) -> list[str]:
        """Return the tokens that the query asks for, in order; those without the field that sorts come last."""
        query, found = self.query, self._found
        order = sorted(
            (t for t in found if found[t] is not None), key=lambda t: (found[t], t), reverse=query.descending
        )
        order += sorted(token for token in found if found[token] is None)
        return order[query.offset : query.offset + query.limit]


def status_of(key: VirtualKey, now: float) -> Status:
    """Return what ``key`` is at ``now``; a blocked key that has also expired is blocked."""
    if key.blocked:
        return "blocked"
    return "expired" if key.expires is not None and now >= key.expires else "active"
