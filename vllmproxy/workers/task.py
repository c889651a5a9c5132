"""What a worker is told at its start, on its standard input, and where it finds what it was given."""

import json
from typing import Any, Final, Self

from attrs import asdict, frozen

from vllmproxy.said import Said

#: Descriptors: of the channel to the parent, of :class:`~vllmproxy.workers.loads.Loads`, and of the first listener,
#: which the others follow.
CHANNEL: Final = 3
LOADS: Final = 4
LISTENERS: Final = 5


@frozen(repr=False)
class Task:
    """Which worker it is, and what it works with.

    :ivar number: from 1.
    :ivar first: what the service was started with, ``now``: what holds since the last reload.
    :ivar reactor: the module of the reactor to run.
    """

    number: int
    first: Said
    now: Said
    reactor: str

    def as_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def of_json(cls, text: bytes) -> Self:
        task: dict[str, Any] = json.loads(text)
        return cls(task["number"], Said.of_json(task["first"]), Said.of_json(task["now"]), task["reactor"])
