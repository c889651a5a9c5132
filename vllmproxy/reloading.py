"""Which settings take effect without a restart, and what each of them changes."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from attrs import evolve, fields_dict
from twisted.internet.interfaces import IAddress
from twisted.logger import Logger

from vllmproxy.exposure import judge_start
from vllmproxy.failing import CannotStart
from vllmproxy.http1.message import Limits
from vllmproxy.keys.masterkey import MasterKey
from vllmproxy.relay.headers import TrustedProxies
from vllmproxy.relay.waits import Timeouts
from vllmproxy.settings import Settings, SettingsError
from vllmproxy.settings_table import TABLE
from vllmproxy.upstreams.probe import Probe

if TYPE_CHECKING:
    from vllmproxy.service import Proxy

_log = Logger(namespace=__name__)

_NAMES: Final = {row.field: row.name for row in TABLE.values()}


def reload(proxy: "Proxy", old: Settings, load: Callable[[], Settings], listening: Sequence[IAddress]) -> Settings:
    """Read the settings again and have requests to come be served by them; return those that now hold.

    :param load: reads them. Where it raises :class:`SettingsError`, or what it returns would open the proxy to whom it
        must not be open, all stay as they are.
    :param listening: the addresses that it can be reached at.
    """
    new = read_again(old, load, listening)
    if new is None:
        return old
    changed = [name for name in _NAMES if getattr(old, name) != getattr(new, name)]
    for change in dict.fromkeys(change for name in changed for change in _CHANGES[name]):
        change(proxy, new)
    names = ", ".join(_NAMES[name] for name in changed) or "no setting"
    _log.info("Reloading: {names} changed", names=names)
    return new


def read_again(old: Settings, load: Callable[[], Settings], listening: Sequence[IAddress]) -> Settings | None:
    """Read the settings again, see :func:`reload`; ``None``, and a line in the log, where they stay as they are."""
    try:
        read = load()
        new = in_force(old, read)
        _check_auth(old, new)
        judge_start(listening, new)
    except (SettingsError, CannotStart) as error:
        _log.error("Reloading: the settings stay as they are: {reason}", reason=str(error))
        return None
    waiting = [name for name in RESTART_ONLY if getattr(new, name) != getattr(read, name)]
    if waiting:
        names = ", ".join(_NAMES[name] for name in waiting)
        _log.warn("Reloading: this takes effect only after a restart: {names}", names=names)
    return new


def _check_auth(old: Settings, new: Settings) -> None:
    """Refuse to switch authentication off: a file that was emptied, or is being written just now, says so too."""
    if old.master_key is not None and new.master_key is None:
        raise SettingsError(
            "there is no master key any more, and authentication is not switched off while it runs: put "
            "master-key-file (or where the key came from) back, or restart to have it off"
        )


def in_force(old: Settings, new: Settings) -> Settings:
    """Return ``new``, as far as it can be without a restart."""
    if old.simulate or new.simulate:  # where the simulator stands for an upstream, that has its address and its key
        new = evolve(new, upstream=old.upstream, master_key=new.master_key or old.master_key)
    return evolve(new, **{name: getattr(old, name) for name in RESTART_ONLY})


def limits_of(settings: Settings) -> Limits:
    """Return what a head may be, as ``settings`` have it."""
    return Limits(settings.max_head, settings.max_headers, settings.max_target, settings.max_body)


def timeouts_of(settings: Settings) -> Timeouts:
    """Return how long an exchange may wait for what, as ``settings`` have it."""
    return Timeouts(
        first_byte=settings.first_byte_timeout,
        first_byte_for=settings.first_byte_timeout_for,
        between_bytes=settings.between_bytes_timeout,
        tunnel_idle=settings.tunnel_idle_timeout,
        line=settings.waiting_timeout,
        total=settings.total_timeout,
    )


def _gate(proxy: "Proxy", settings: Settings) -> None:
    proxy.gate.master = MasterKey(settings.master_key.reveal()) if settings.master_key else None


def _cache(proxy: "Proxy", settings: Settings) -> None:
    proxy.cache.ttl, proxy.cache.max_stale = settings.key_cache_ttl, settings.key_max_stale


def _wire(proxy: "Proxy", settings: Settings) -> None:
    factory = proxy.factory
    factory.change_limits(limits_of(settings))
    factory.head_deadlines.change(settings.head_timeout)
    factory.idle_deadlines.change(settings.idle_timeout)
    factory.change_body(settings.body_timeout, settings.min_body_rate)
    factory.write_deadlines.change(settings.write_timeout)


def _clients(proxy: "Proxy", settings: Settings) -> None:
    proxy.factory.client_of = TrustedProxies(settings.trusted_proxy).client_of_peer


def _relay(proxy: "Proxy", settings: Settings) -> None:
    relay = proxy.relay
    relay.prices, relay.usage = settings.prices, settings.usage
    relay.max_inspected_body, relay.max_held = settings.max_inspected_body, settings.max_held_bodies
    relay.waits.change(timeouts_of(settings))
    relay.quotas.budget_status = settings.budget_status
    relay.trusted = TrustedProxies(settings.trusted_proxy)


def _upstream(proxy: "Proxy", settings: Settings) -> None:
    proxy.relay.serve(proxy.make_server(settings))
    proxy.probe = Probe(proxy.relay.server, proxy.relay.clock)


def _api(proxy: "Proxy", settings: Settings) -> None:
    api = proxy.make_api(settings)
    proxy.api.site = api.site()
    proxy.api.max_body, proxy.api.max_held = settings.max_api_body, settings.max_held_api_bodies
    proxy.api.trusted = TrustedProxies(settings.trusted_proxy)


#: What follows from each setting that can change; what is not here waits for a restart.
_CHANGES: Mapping[str, tuple[Callable[["Proxy", Settings], None], ...]] = {
    "upstream": (_upstream,),
    "upstream_key": (_upstream,),
    "upstream_ca": (_upstream,),
    "master_key": (_gate,),
    "open": (),  # it is judged before anything changes
    "trusted_proxy": (_relay, _api, _clients),
    "open_metrics": (_api,),
    "connect_timeout": (_upstream,),
    "head_timeout": (_wire,),
    "idle_timeout": (_wire,),
    "body_timeout": (_wire,),
    "min_body_rate": (_wire,),
    "first_byte_timeout": (_relay,),
    "first_byte_timeout_for": (_relay,),
    "between_bytes_timeout": (_relay,),
    "total_timeout": (_relay,),
    "tunnel_idle_timeout": (_relay,),
    "waiting_timeout": (_relay,),
    "upstream_idle_timeout": (_upstream,),
    "write_timeout": (_wire, _upstream),
    "max_head": (_wire,),
    "max_headers": (_wire,),
    "max_target": (_wire,),
    "max_body": (_wire,),
    "max_api_body": (_api,),
    "max_held_api_bodies": (_api,),
    "max_inspected_body": (_relay,),
    "max_held_bodies": (_relay,),
    "prices": (_relay, _api),
    "budget_status": (_relay,),
    "usage": (_relay,),
    "key_cache_ttl": (_cache,),
    "key_max_stale": (_cache,),
    "drain_delay": (),  # these are looked at when it stops
    "drain_timeout": (),
}

#: Fields of :class:`Settings` that a reload leaves as they were.
RESTART_ONLY: Final = tuple(name for name in fields_dict(Settings) if name not in _CHANGES)
