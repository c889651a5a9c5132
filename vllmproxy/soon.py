"""Work that may wait until several events have been acted on, to be done together with more of its kind.

Of a request's cost about half is what it takes to bring the code and the data of each step close to the processor: a
step that is taken for several requests in a row costs half as much.
"""

from collections.abc import Callable

#: Calls what it is given, which writes to no connection, before anything that clients or vLLM are sent from now on
#: leaves: see :meth:`vllmproxy.turn.Turn.before_writing`.
Soon = Callable[[Callable[[], None]], None]


def at_once(work: Callable[[], None]) -> None:
    """Where nothing is gathered."""
    work()
