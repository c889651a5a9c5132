"""Puts virtual keys into a store, many at a time, by the store's own interface.

    python benchmarks/_keys.py STORE FIRST COUNT FIELDS

``FIELDS`` are those of :class:`~vllmproxy.keys.key.VirtualKey` as a JSON object; the keys are ``secret_of(FIRST)`` and
on.
"""

import json
import sys
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import react

from vllmproxy.keys.key import VirtualKey, hash_key
from vllmproxy.store.interface import Writes
from vllmproxy.store.opening import make_store

#: In one change.
_BATCH = 500


def secret_of(number: int) -> str:
    """Return the key with that number."""
    return f"sk-benchmark-{number:08d}"


async def _add(reactor: Any, url: str, first: int, count: int, fields: dict[str, Any]) -> None:
    store = make_store(url, reactor=reactor)
    await store.open()
    try:
        for begin in range(first, first + count, _BATCH):
            secrets = [secret_of(number) for number in range(begin, min(begin + _BATCH, first + count))]
            keys = tuple(VirtualKey(token=hash_key(secret), key_name="sk-...", **fields) for secret in secrets)
            await store.change_keys([key.token for key in keys], lambda _, keys=keys: Writes(put=keys))
    finally:
        await store.close()


if __name__ == "__main__":
    store_url, first, count, fields = sys.argv[1:]
    arguments = (store_url, int(first), int(count), json.loads(fields))
    react(lambda reactor: Deferred.fromCoroutine(_add(reactor, *arguments)))
