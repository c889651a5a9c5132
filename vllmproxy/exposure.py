"""What a bound listener means for safety: who can reach it, and whether the master key is good enough.

Judged on the addresses that the ports really have, after listening: a ``systemd:`` endpoint, for one, does
not tell before.
"""

import ipaddress
import os
from collections.abc import Sequence

from attrs import frozen
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress
from twisted.logger import Logger

from vllmproxy.failing import CannotStart
from vllmproxy.keys.masterkey import weakness
from vllmproxy.settings import Secret, Settings

_log = Logger(namespace=__name__)


@frozen(kw_only=True)
class Verdict:
    """What to do about the listeners.

    :ivar refusal: why the proxy must not go on, in one sentence; ``None`` where it may.
    :ivar warnings: sentences for the log.
    """

    refusal: str | None = None
    warnings: tuple[str, ...] = ()


def is_local(address: IAddress) -> bool:
    """Tell whether only this machine can reach ``address``: loopback, its IPv4-mapped form, a UNIX socket."""
    if isinstance(address, UNIXAddress):
        return True
    if not isinstance(address, IPv4Address | IPv6Address):
        return False
    try:
        ip = ipaddress.ip_address(address.host)
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def judge(addresses: Sequence[IAddress], *, master_key: Secret | None, open: bool) -> Verdict:
    """Judge the addresses a proxy listens on. No address at all counts as reachable from anywhere.

    :param open: ``--open``, which allows auth to be off, and never a weak master key.
    """
    outside = [address for address in addresses if not is_local(address)]
    local = bool(addresses) and not outside
    where = ", ".join(map(_name, outside)) or "an unknown address"
    if master_key is None:
        return _without_key(local, where, open)
    reason = weakness(master_key.reveal())
    if reason is None:
        return Verdict()
    if local:
        return Verdict(warnings=(f"This will do for trying out on loopback only: {reason}.",))
    return Verdict(refusal=f"{where} can be reached from other machines, and {reason}")


def judge_start(addresses: Sequence[IAddress], settings: Settings) -> None:
    """Judge what a process is about to do; warn of it in the log, or raise :class:`CannotStart`."""
    verdict = judge(addresses, master_key=settings.master_key, open=settings.open)
    if verdict.refusal is not None:
        raise CannotStart(verdict.refusal)
    for warning in verdict.warnings:
        _log.warn("{warning}", warning=warning)
    kept = settings.kept_master_key
    if settings.master_key is None and os.path.exists(kept):  # which minds no directory that is not ours to read
        _log.warn("There is a master key in {path}, which is not used: give --master-key-file {path}", path=str(kept))


def _without_key(local: bool, where: str, open: bool) -> Verdict:
    if local:
        return Verdict(warnings=("Auth is off: there is no master key, so everybody on this machine may call vLLM.",))
    if open:
        return Verdict(
            warnings=(
                f"AUTH IS OFF AND {where} IS OPEN TO OTHER MACHINES, as --open asks: whoever reaches it may use vLLM.",
            )
        )
    return Verdict(
        refusal=f"there is no master key and {where} can be reached from other machines: give "
        "--master-key-file (or VLLMPROXY_MASTER_KEY), or listen on 127.0.0.1, or say --open to have auth off"
    )


def _name(address: IAddress) -> str:
    if isinstance(address, IPv4Address | IPv6Address):
        host = f"[{address.host}]" if ":" in address.host else address.host
        return f"{host}:{address.port}"
    return repr(address)
