"""Was it executed? What TCP knows about a request whose reused connection ended without a byte of an answer.

To HTTP that is ambiguous; a POST must not be sent again unless it is certain that vLLM never saw any of it.
"""

from enum import Enum

from vllmproxy.http1.sockets import Delivery


class Fate(Enum):
    """What has become of a request."""

    UNSEEN = "vLLM cannot have seen a byte of it"
    UNKNOWN = "vLLM may have seen it"
    OPEN = "it is on its way; the peer's kernel has yet to take it or to refuse it"


def fate_of(before: Delivery | None, now: Delivery | None, *, orderly: bool) -> Fate:
    """Judge by the connection's counts when the request began and now.

    :param orderly: the peer closed with a FIN; ``False``: it reset, or nothing is known.

    Nothing left this machine, or after a FIN our segments were answered by a reset (the peer has closed entirely, and
    a FIN confirms all that came before it): unseen. A confirmed byte: not. After a FIN alone the peer may still read
    (half-close), so its kernel's word on our segments has to be waited for. A reset without a FIN proves nothing:
    Linux may delay a confirmation by 40 ms, and a peer that read the request and then reset looks the same as one that
    never got it.
    """
    if before is None or now is None:
        return Fate.UNKNOWN
    if now.segments == before.segments:
        return Fate.UNSEEN
    if now.acknowledged > before.acknowledged or not orderly:
        return Fate.UNKNOWN
    return Fate.UNSEEN if now.closed else Fate.OPEN
