"""The bodies that change a key which there is, as values. Pure."""

from collections.abc import Mapping
from typing import Any, Final

from attrs import evolve, field, frozen

from vllmproxy.api.fields import name_of, parse_fields, token_of
from vllmproxy.api.values import custom_key, money, parse_duration, refuse_unknown, text, typed
from vllmproxy.errors import BadRequest
from vllmproxy.keys.key import VirtualKey, hash_key

#: Keys in one ``POST /key/bulk_update``, as at LiteLLM.
MAXIMUM_BULK: Final = 500

#: Changing one of these decides anew what a key opens.
_POWERS: Final = frozenset({"allowed_routes", "key_type"})


@frozen
class KeyName:
    """How a caller names a key: by itself or its hash, or by its alias. Exactly one is given."""

    key: str | None = field(default=None, repr=False)
    alias: str | None = None

    @property
    def token(self) -> str | None:
        """The key's id, ``None`` where only the store can tell it."""
        return None if self.key is None else token_of(self.key)


@frozen(kw_only=True)
class KeyPatch:
    """A merge patch for a key.

    :ivar fields: those of :class:`VirtualKey` that change.
    :ivar spend: what it is to have spent, in micro-units, ``None``: what it has.
    """

    fields: Mapping[str, Any]
    spend: int | None = None

    def apply(self, key: VirtualKey, now: float, updated_by: str, *, is_master: bool) -> VirtualKey:
        """Return ``key`` changed at ``now`` (epoch seconds) by ``updated_by``."""
        granted = self._grants(key, is_master)
        changed = evolve(key, **self.fields, updated_at=now, updated_by=updated_by, granted_by_master=granted)
        if "budget_duration" not in self.fields:
            return changed
        start, reset_at = key.budget.renewed(changed.budget_duration, now)
        return evolve(changed, budget_start=start, budget_reset_at=reset_at)

    def _grants(self, key: VirtualKey, is_master: bool) -> bool:
        """Whether the master key stands behind what the key opens from now on: behind all of it. Routes that somebody
        else put there are not granted by a later change of the type alone."""
        if not _POWERS & self.fields.keys():
            return key.granted_by_master
        return is_master and ("allowed_routes" in self.fields or not key.allowed_routes or key.granted_by_master)


@frozen(kw_only=True)
class Regeneration:
    """What ``POST /key/regenerate`` asks for.

    :ivar new_key: a custom key, ``None``: make one.
    :ivar duration: as sent.
    :ivar grace: seconds that the old key goes on working.
    """

    new_key: str | None = field(repr=False)
    duration: str | None
    grace: int
    patch: KeyPatch

    def replace(self, old: VirtualKey, new: str, now: float, by: str, *, is_master: bool) -> VirtualKey:
        """Return the row of the ``new`` key, which takes the place of ``old``."""
        return evolve(self.patch.apply(old, now, by, is_master=is_master), token=hash_key(new), key_name=name_of(new))

    def retire(self, old: VirtualKey, now: float, by: str) -> VirtualKey | None:
        """Return the row of the ``old`` key while it still works, ``None``: it ends at once."""
        if not self.grace:
            return None
        until = now + self.grace
        ends = until if old.expires is None else min(old.expires, until)
        return evolve(old, key_alias=None, expires=ends, updated_at=now, updated_by=by)


def parse_name(body: Mapping[str, Any], *, alias: bool = True) -> KeyName:
    """Return which key ``body`` means; where it names one both ways, by ``key``. Raises :class:`BadRequest`."""
    key = typed(body, "key", str, "a string")
    if key:
        return KeyName(key=key)
    name = text(body, "key_alias") if alias else None
    if name is None:
        raise BadRequest("Name the key: key (itself or its hash)" + (" or key_alias." if alias else "."), param="key")
    return KeyName(alias=name)


def parse_update(body: Mapping[str, Any], now: float) -> tuple[KeyName, KeyPatch]:
    """Return which key ``POST /key/update`` means, and what changes. Raises :class:`BadRequest`."""
    name = parse_name(body)
    naming = {"key", "spend"} if name.alias is None else {"key", "key_alias", "spend"}
    return name, KeyPatch(fields=parse_fields(_without(body, naming), now), spend=money(body, "spend"))


def parse_block(body: Mapping[str, Any]) -> KeyName:
    """Return which key ``POST /key/block`` and ``/key/unblock`` mean. Raises :class:`BadRequest`."""
    refuse_unknown(body, frozenset({"key", "key_alias"}))
    return parse_name(body)


def parse_regenerate(body: Mapping[str, Any], now: float) -> Regeneration:
    """Return what ``body`` asks for, whichever key it names. Raises :class:`BadRequest`."""
    grace = None
    if body.get("grace_period") not in (None, ""):
        grace = parse_duration(body, "grace_period", now)
        if grace is None:
            raise BadRequest('grace_period has an end: "1h", "2d".', param="grace_period")
    fields = parse_fields(_without(body, {"key", "new_key", "grace_period"}), now)
    return Regeneration(
        new_key=custom_key(body, "new_key"),
        duration=body.get("duration"),
        grace=grace or 0,
        patch=KeyPatch(fields=fields),
    )


def parse_reset(body: Mapping[str, Any]) -> tuple[KeyName, int]:
    """Return which key ``POST /key/{key}/reset_spend`` means, and the micro-units that it is to have spent.

    :raises BadRequest: that is no amount of money.
    """
    refuse_unknown(body, frozenset({"key", "reset_to"}))
    amount = money(body, "reset_to")
    if amount is None:
        raise BadRequest("Say what it is to have spent: reset_to, a number from 0 up.", param="reset_to")
    return parse_name(body, alias=False), amount


def parse_bulk(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the bodies of the updates that ``POST /key/bulk_update`` asks for. Raises :class:`BadRequest`."""
    refuse_unknown(body, frozenset({"keys"}))
    updates: list[Any] = typed(body, "keys", list, "a list of objects") or []
    if not 0 < len(updates) <= MAXIMUM_BULK or not all(isinstance(update, dict) for update in updates):
        raise BadRequest(f"keys must be a list of 1 to {MAXIMUM_BULK} objects, as for /key/update.", param="keys")
    return updates


def _without(body: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}
