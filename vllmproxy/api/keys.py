"""``/key/generate``, ``/key/update``, ``/key/delete`` …: what changes keys, as LiteLLM's users know it."""

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from attrs import evolve
from klein import Klein
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.iweb import IRequest

from vllmproxy.api.caller import manager_of
from vllmproxy.api.errors import answer_json
from vllmproxy.api.fields import new_key, parse_delete, parse_generate, parse_object, row_of, token_of
from vllmproxy.api.management import KEY_NOT_FOUND, ManagementCall, request_id_of
from vllmproxy.api.patches import (
    KeyName,
    KeyPatch,
    parse_block,
    parse_bulk,
    parse_name,
    parse_regenerate,
    parse_reset,
    parse_update,
)
from vllmproxy.errors import ApiError, BadRequest, NotFound
from vllmproxy.keys.gate import Gate
from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.store.interface import AliasTaken, Decide, Store, StoreUnavailable, TokenTaken, Writes
from vllmproxy.usage.sums import NO_ACCOUNT, Account, Spent

_log = Logger(namespace=__name__)

Found = Mapping[str, VirtualKey]
TellUsage = Callable[[], Awaitable[None]]
Work = Callable[[ManagementCall, dict[str, Any]], Awaitable[dict[str, Any]]]


class KeyApi:
    """The handlers.

    :param clock: ``seconds()`` is the time of day, seconds since the epoch.
    :param tell_usage: has the store told of all that was used until now, as far as that can be done soon.
    :param priced: there are prices, so that budgets of money can be kept.
    """

    def __init__(self, gate: Gate, store: Store, clock: IReactorTime, tell_usage: TellUsage, *, priced: bool) -> None:
        self._priced = priced
        self._tell_usage = tell_usage
        self._gate = gate
        self._store = store
        self._clock = clock

    def register(self, app: Klein) -> None:
        """Add the routes to ``app``."""
        works: dict[str, Work] = {
            "/key/generate": self.generate,
            "/key/update": self.update,
            "/key/bulk_update": self.bulk_update,
            "/key/block": partial(self.block, blocked=True),
            "/key/unblock": partial(self.block, blocked=False),
            "/key/regenerate": self.regenerate,
            "/key/delete": self.delete,
        }
        for endpoint, work in works.items():
            app.route(endpoint, methods=["POST"], endpoint=endpoint)(self._handler(endpoint, work))
        for name, work in {"regenerate": self.regenerate, "reset_spend": self.reset_spend}.items():
            named = f"/key/<key>/{name}"
            app.route(named, methods=["POST"], endpoint=named)(self._handler(f"/key/{name}", work))

    def _handler(self, endpoint: str, work: Work) -> Callable[..., Awaitable[bytes]]:
        """Return the handler that does ``work`` for those who may, and writes down what was refused to them."""

        async def handler(request: IRequest, **named: str) -> bytes:
            caller = await manager_of(self._gate, request, endpoint)
            call = ManagementCall(caller, endpoint, self._clock.seconds(), request_id_of(request))
            try:
                return answer_json(request, await work(call, {**_object_of(request), **named}))
            except ApiError as error:
                await self._refused(call, error)
                raise

        return handler

    async def generate(self, call: ManagementCall, body: dict[str, Any]) -> dict[str, Any]:
        """Make a key, and show it this once."""
        wanted = parse_generate(body, call.time)
        key = wanted.key or _fresh_key()
        row = new_key(wanted, key, call.time, call.actor, granted_by_master=call.caller.is_master)
        self._check(call, None, row)

        def add(found: Found) -> Writes:
            if found:
                raise TokenTaken
            writes = Writes(put=(row,), audit=(call.changed(None, row),))
            return writes if wanted.spend is None else _spent(call, writes, NO_ACCOUNT, wanted.spend)

        writes = await self._change([row.token], add, made=row.token, alias=row.key_alias)
        shown = row_of(row, call.time, _account_after(writes, row.token, NO_ACCOUNT))
        return {"key": key, "token": row.token, "token_id": row.token, "duration": wanted.duration, **shown}

    async def update(self, call: ManagementCall, body: dict[str, Any]) -> dict[str, Any]:
        """Change what a merge patch names: absent fields stay, null clears."""
        name, patch = parse_update(body, call.time)
        row = await self._patch(call, name, patch)
        return {"key": name.key or row["token"], **row}

    async def block(self, call: ManagementCall, body: dict[str, Any], *, blocked: bool) -> dict[str, Any]:
        """Block a key, or let it work again; answer with its row."""
        return await self._patch(call, parse_block(body), KeyPatch(fields={"blocked": blocked}))

    async def bulk_update(self, call: ManagementCall, body: dict[str, Any]) -> dict[str, Any]:
        """Make several updates, each by itself; what fails is told and leaves the others alone."""
        updates = parse_bulk(body)
        done: list[dict[str, Any]] = []
        failed: list[dict[str, Any]] = []
        outage: StoreUnavailable | None = None
        for update in updates:
            name = update.get("key") or update.get("key_alias")
            try:
                if outage is not None:
                    raise outage
                row = await self.update(call, update)
                done.append({"key": name, "key_info": row})
            except StoreUnavailable as error:
                outage = error
                failed.append({"key": name, "key_info": None, "failed_reason": "The store did not answer."})
            except ApiError as error:
                await self._refused(call, error)
                failed.append({"key": name, "key_info": None, "failed_reason": error.message})
        return {"total_requested": len(updates), "successful_updates": done, "failed_updates": failed}

    async def regenerate(self, call: ManagementCall, body: dict[str, Any]) -> dict[str, Any]:
        """Put a new key in the place of one that there is, and show it this once."""
        name, wanted = parse_name(body, alias=False), parse_regenerate(body, call.time)
        new = wanted.new_key or _fresh_key()
        old, token = await self._token_of(name), hash_key(new)
        if token == old:
            raise BadRequest("new_key is the key that there is.", param="new_key")

        alias = wanted.patch.fields.get("key_alias")

        def replace(found: Found) -> Writes:
            before = call.find(found, old)
            if token in found:
                raise TokenTaken
            after = wanted.replace(before, new, call.time, call.actor, is_master=call.caller.is_master)
            self._check(call, before, after)
            kept = wanted.retire(before, call.time, call.actor)
            audit, heir = (call.changed(before, after),), {token: old}
            if kept is None:
                return Writes((after,), (old,), audit, heir)
            return Writes((after, kept), (), audit, heir)

        account = await self._spent_until_now(old)  # before: afterwards nothing may fail, the key is shown only once
        row = (await self._change([old, token], replace, made=token, param="new_key", alias=alias)).put[0]
        shown = row_of(row, call.time, account)
        return {"key": new, "token": token, "token_id": token, "duration": wanted.duration, **shown}

    async def reset_spend(self, call: ManagementCall, body: dict[str, Any]) -> dict[str, Any]:
        """Set what a key has spent in the period of its budget; answer with its row, and what it was before."""
        name, spend = parse_reset(body)
        token = await self._token_of(name)
        account = await self._spent_until_now(token)

        def reset(found: Found) -> Writes:
            return _spent(call, Writes(put=(call.find(found, token),)), account, spend)

        writes = await self._change([token], reset)
        (key,) = writes.put
        shown = row_of(key, call.time, _account_after(writes, token, account))
        return {"token": token, **shown, "previous_spend": row_of(key, call.time, account)["spend"]}

    def _check(self, call: ManagementCall, before: VirtualKey | None, after: VirtualKey) -> None:
        """Raise :class:`~vllmproxy.errors.ApiError` if a key may not become this."""
        call.check(after)
        for name in ("max_budget", "soft_budget"):
            value = getattr(after, name)
            if value is not None and value != getattr(before, name, None) and not self._priced:
                raise BadRequest(
                    f"{name} cannot be kept: this proxy has no prices (--prices). max_budget_tokens needs none.",
                    param=name,
                )

    async def delete(self, call: ManagementCall, body: dict[str, Any]) -> dict[str, Any]:
        """Delete keys by themselves, their hashes or their aliases, and answer with those names.

        Names of nothing are answered in ``not_found`` (ours), or with 404 when nothing at all was deleted.
        """
        wanted = parse_delete(body)
        named: list[tuple[str, str | None]] = [(key, token_of(key)) for key in wanted.keys]
        aliased = await self._store.find_aliases(wanted.aliases) if wanted.aliases else {}
        by_key = {token for _, token in named}
        by_alias = {token: alias for alias, token in aliased.items() if token not in by_key}

        def remove(found: Found) -> Writes:
            # An alias may have moved to another key since it was looked up.
            gone = [key for token, key in found.items() if by_alias.get(token, key.key_alias) == key.key_alias]
            for key in gone:
                call.check(key)
            return Writes(remove=tuple(key.token for key in gone), audit=tuple(call.changed(key, None) for key in gone))

        named += [(alias, aliased.get(alias)) for alias in wanted.aliases]
        removed = (await self._change(sorted({token for _, token in named if token}), remove)).remove
        gone = [name for name, token in named if token in removed]
        if not gone:
            raise NotFound(f"{KEY_NOT_FOUND}: nothing was deleted.", param="keys" if wanted.keys else "key_aliases")
        missing = [name for name, token in named if token not in removed]
        return {"deleted_keys": gone, **({"not_found": missing} if missing else {})}

    async def _patch(self, call: ManagementCall, name: KeyName, patch: KeyPatch) -> dict[str, Any]:
        token = await self._token_of(name)
        account = await (self._store.read_account if patch.spend is None else self._spent_until_now)(token)

        def change(found: Found) -> Writes:
            before = call.find(found, token, name.alias)
            after = patch.apply(before, call.time, call.actor, is_master=call.caller.is_master)
            self._check(call, before, after)
            writes = Writes(put=(after,), audit=(call.changed(before, after),))
            return writes if patch.spend is None else _spent(call, writes, account, patch.spend)

        writes = await self._change([token], change, alias=patch.fields.get("key_alias"))
        return {"token": token, **row_of(writes.put[0], call.time, _account_after(writes, token, account))}

    async def _spent_until_now(self, token: str) -> Account:
        """Return a key's account when it has all that was used until now: what is told later is added to what is set
        next, or is the old key's."""
        await self._tell_usage()
        return await self._store.read_account(token)

    async def _token_of(self, name: KeyName) -> str:
        if name.token is not None:
            return name.token
        token = (await self._store.find_aliases([name.alias or ""])).get(name.alias or "")
        if token is None:
            raise NotFound(f"{KEY_NOT_FOUND}.", param="key_alias")
        return token

    async def _change(
        self,
        tokens: Sequence[str],
        decide: Decide,
        *,
        made: str | None = None,
        param: str = "key",
        alias: str | None = None,
    ) -> Writes:
        """Do it, and log it.

        :param made: the token of a key that must not be there yet, nor be the master key's.
        :param param: the field that gave it.
        :param alias: what some key is to be called.
        """
        taken = BadRequest(f"That key exists already; leave {param} out to have a fresh one made.", param=param)
        if made is not None and self._gate.is_master_token(made):
            raise taken
        try:
            writes = await self._store.change_keys(tokens, decide)
        except TokenTaken:
            raise taken from None
        except AliasTaken:
            message = f"Key alias {alias!r} is taken by another key; aliases are unique."
            raise BadRequest(message, param="key_alias") from None
        for entry in writes.audit:
            what = "made" if entry.before is None else "deleted" if entry.after is None else "changed"
            _log.info("Key {key_id} was {what} by {actor}", key_id=entry.target, what=what, actor=entry.actor)
        return writes

    async def _refused(self, call: ManagementCall, error: ApiError) -> None:
        try:
            await self._store.add_audit(call.refused(error.status))
        except StoreUnavailable:
            _log.warn("A refused {endpoint} is not in the audit trail: the store is away", endpoint=call.endpoint)


def _spent(call: ManagementCall, writes: Writes, before: Account, money: int) -> Writes:
    """Return ``writes``, of one key, with what it has spent: so much in the period of its budget that it is now.

    :param before: its account, as it was read just before: for the audit trail.
    """
    (key,) = writes.put
    said = Spent(key.budget.period(call.time)[0], money)
    audit = (*writes.audit, call.spent(key, before, said.applied(before)))
    return evolve(writes, spent={key.token: said}, audit=audit)


def _account_after(writes: Writes, token: str, before: Account) -> Account:
    said = writes.spent.get(token)
    return before if said is None else said.applied(before)


def _fresh_key() -> str:
    return f"sk-{secrets.token_urlsafe(32)}"


def _object_of(request: IRequest) -> dict[str, Any]:
    request.content.seek(0)
    return parse_object(request.content.read())
