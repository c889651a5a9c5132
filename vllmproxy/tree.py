"""The top of the tree of resources: what is vLLM's, and what is the proxy's own."""

from collections.abc import Callable

from vllmproxy.http1.stream import Stream
from vllmproxy.relay.targets import is_under_prefix


class Tree:
    """Sends each request down its branch.

    :param relayed: takes what is for vLLM; ``own``: all else.
    """

    def __init__(self, relayed: Callable[[Stream], None], own: Callable[[Stream], None]) -> None:
        self._relayed = relayed
        self._own = own

    def handle(self, stream: Stream) -> None:
        """Take a request whose head is complete."""
        if is_under_prefix(stream.head.target):
            self._relayed(stream)
        else:
            self._own(stream)
