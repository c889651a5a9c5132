"""What the proxy asks of a store; memory, SQLite and Redis are its three twins."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from attrs import field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from vllmproxy.keys.key import VirtualKey
from vllmproxy.limits.interface import Limiter
from vllmproxy.store.listing import KeyPage, KeyQuery
from vllmproxy.usage.event import UsageEvent
from vllmproxy.usage.ledger import Tally
from vllmproxy.usage.sums import Account, Spent, UsageQuery, UsageSum

#: The layout of what is stored. An older one is brought up to this; a store with a newer one is not opened.
SCHEMA_VERSION = 3


class AliasTaken(Exception):
    """Another key already has that alias; choose a different one or delete that key first."""


class TokenTaken(Exception):
    """That very key exists already; leave ``key`` out to have a fresh one made."""


class StoreUnavailable(Exception):
    """The store did not answer in time or cannot be reached; nothing is known about the key either way."""


class CannotOpenStore(Exception):
    """The store cannot be used at all (unreadable file, wrong schema version, refused connection): do not start."""


@frozen(kw_only=True)
class AuditEntry:
    """One management call, for ever. Holds no secret.

    :ivar time: seconds since the epoch.
    :ivar actor: the id of the key that called, or ``master``.
    :ivar action: the endpoint, ``/key/update``.
    :ivar target: the id of the key that it was about, ``None`` where that is not known.
    :ivar before: its row before, ``None``: there was none.
    :ivar after: its row afterwards, ``None``: there is none.
    :ivar request_id: the caller's ``x-request-id``.
    :ivar status: the HTTP status; other than 200 nothing was changed.
    """

    time: float
    actor: str
    action: str
    target: str | None = None
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    request_id: str | None = None
    status: int = 200


@frozen
class StoredEntry:
    """An audit entry as it is kept.

    :ivar id: its place, newer ones after older ones; only ``list_audit`` of the same store can read it.
    :ivar fields: those of :class:`AuditEntry`, and whatever another version wrote besides.
    """

    id: str
    fields: Mapping[str, Any]


@frozen
class Writes:
    """What one change does, all of it or nothing.

    :ivar put: keys that are written, new or over what there is.
    :ivar remove: tokens of keys that are deleted.
    :ivar audit: what is written down about it.
    :ivar inherits: token of a key in ``put`` → token of the key whose account it takes over as it stands: a key that is
        regenerated has spent what it had. The account of a key that is removed goes with it, and any other new key
        begins with nothing.
    :ivar spent: token → what is said of its account, with a change of its key or without. What requests under way hold
        stays held, unless it is another period than it was, or nothing at all was spent: then nothing is held either.
    """

    put: tuple[VirtualKey, ...] = ()
    remove: tuple[str, ...] = ()
    audit: tuple[AuditEntry, ...] = ()
    inherits: Mapping[str, str] = field(factory=dict)
    spent: Mapping[str, Spent] = field(factory=dict)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of all keys that it touches."""
        return (*self.remove, *(key.token for key in self.put))


#: Says what to write, from those of the keys asked for that exist. Pure: a store may call it in a thread, and more
#: than once. Whatever it raises reaches the caller, and nothing is written.
Decide = Callable[[Mapping[str, VirtualKey]], Writes]


class Store(Protocol):
    """Keeps virtual keys. Every method may raise :class:`StoreUnavailable` and ends within its own deadline."""

    async def open(self) -> None:
        """Connect, and create, migrate or check the schema, which has no deadline. Raises :class:`CannotOpenStore`."""

    async def close(self) -> None:
        """Let go of everything; pending calls fail with :class:`StoreUnavailable`. Idempotent."""

    async def ping(self) -> None:
        """Return when the store answers."""

    def watch_keys(self, changed: Callable[[str | None], None]) -> None:
        """Have ``changed`` called when keys change. Before :meth:`open`.

        It gets the token of a key that was changed or deleted, perhaps more than once for one change: by this process,
        before :meth:`change_keys` returns, and also where whoever called that has given up meanwhile; by another
        process, where a store can tell (SQLite cannot). Or ``None`` when that may have gone unheard, for any key, as
        when the connection to hear it over was lost or made again. It must not raise.
        """

    def limiter(self, clock: IReactorTime) -> Limiter:
        """Return what counts requests where this store keeps keys; ``docs/limits.rst`` says what it guarantees."""

    def get_key(self, token: str) -> Deferred[VirtualKey | None]:
        """Return the key with that id (sha256 hex), ``None`` when there is none."""

    async def find_aliases(self, aliases: Sequence[str]) -> dict[str, str]:
        """Return alias → token for those of ``aliases`` that exist."""

    async def change_keys(self, tokens: Sequence[str], decide: Decide) -> Writes:
        """Read the keys ``tokens``, and write what ``decide`` makes of them; nobody writes them in between.

        Nobody sees half of it either. ``decide`` may write these tokens only. Aliases are free for the keys of the
        same change as soon as it takes them from others.

        :raises AliasTaken: a key that this does not touch has an alias that it would give.
        """

    async def list_keys(self, query: KeyQuery) -> KeyPage:
        """Return a part of the keys that ``query`` asks for, and how many there are."""

    async def add_audit(self, entry: AuditEntry) -> None:
        """Write down a call that changed nothing."""

    async def list_audit(self, limit: int, before: str | None = None) -> list[StoredEntry]:
        """Return at most ``limit`` entries, the newest first, older than the one with the id ``before``."""

    async def add_usage(
        self, writer: str, first: int, events: Sequence[UsageEvent], tally: Tally | None = None
    ) -> None:
        """Add events to the sums and to the accounts of virtual keys, each exactly once.

        All of them or none, up to 200; more may be added in pieces of so many, in order. Of one key and day only so
        many models and end users have sums of their own, see :mod:`vllmproxy.usage.ledger`. Sums are kept for
        400 days. A writer is known until it is to be forgotten; Redis knows it for 90 days after it was last heard of
        at most.

        An account whose period is older than an event's begins anew with it; an event of an older period is added to
        the sums only. With ``requests`` = 0 an event counts nowhere in the sums. The account of a key that there is not
        goes after a while, as the old sums do.

        :param writer: names a journal; its events are numbered 1, 2, 3 … and come in that order.
        :param first: the number of the first of ``events``. Those up to the last number that was added are left out;
            that some are missing before it does not matter.
        :param tally: of all of these, where somebody has kept it.
        """

    async def forget_writer(self, writer: str) -> None:
        """The writer's journal is gone: its events will not come again."""

    async def read_usage(self, query: UsageQuery) -> list[UsageSum]:
        """Return the sums that ``query`` asks for, one for each group that there is, in the order of the groups.

        What is added meanwhile may be in it or not.

        :raises TooManySums: there are more than ``MOST_GROUPS``, see :mod:`vllmproxy.usage.ledger`.
        """

    async def read_account(self, token: str) -> Account:
        """Return what the key with that id has spent; nothing where nothing was added yet."""
