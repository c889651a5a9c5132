"""How many files this process may have open, which is how many connections it can hold."""

import resource
from contextlib import suppress

from attrs import frozen

from vllmproxy.http1.factory import RESERVE

#: Descriptors for everything but connections and their requests: listeners, store, journal, logs, pollers, probes, what
#: one turn of the reactor accepts before it resets, and the reserve.
_OTHERS = 192 + RESERVE
#: More than that in one process is slower than in two.
_PLENTY = 10_000
#: Fewer than that are few enough to say so.
_FEW = 1_000


@frozen
class Capacity:
    """How many connections are taken.

    :ivar warning: a sentence for the log, where that is fewer than wanted.
    """

    connections: int
    warning: str | None = None


def raise_open_files() -> int:
    """Raise the limit of open files as far as it goes without privileges, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # no limit at all is more than some kernels let a process ask for
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def capacity(open_files: int, wanted: int | None) -> Capacity:
    """Return how many connections fit: a request needs two descriptors, the client's and vLLM's.

    :param wanted: ``max_connections``, ``None`` where nothing was said.
    """
    if open_files == resource.RLIM_INFINITY:
        return Capacity(_PLENTY if wanted is None else wanted)
    fit = max((open_files - _OTHERS) // 2, 1)
    needed = 2 * (wanted or _FEW) + _OTHERS
    advice = f"Raise the limit to {needed} or more (LimitNOFILE= in the unit, ulimit -Hn)."
    if wanted is None:
        few = f"Only {open_files} files may be open, so at most {fit} connections are taken at once. {advice}"
        return Capacity(min(fit, _PLENTY), few if fit < _FEW else None)
    if fit < wanted:
        return Capacity(
            fit,
            f"--max-connections: {wanted} do not fit, as only {open_files} files may be open; at most {fit} "
            f"connections are taken at once. {advice}",
        )
    return Capacity(wanted)
