"""Names and versions of what is kept in Redis.

::

    vllmproxy:schema            the version of this layout
    vllmproxy:{TOKEN}:key       a hash: row (JSON)
    vllmproxy:alias:ALIAS       the token
    vllmproxy:keys              a sorted set: tokens by the time that their keys were made
    vllmproxy:audit             a stream: an entry (JSON) for each management call
    vllmproxy:{TOKEN}:budget    a hash: period, spend, tokens, and what is held (:mod:`vllmproxy.store.limits_lua`)
    vllmproxy:usage:writer:NAME the number of the last event that was added of that writer; for 90 days after the last
    vllmproxy:usage:DAY         a set: the keys that have sums of that day (2026-11-26); like all below for 400 days
    vllmproxy:{TOKEN}:usage:DAY             a hash: a row's numbers, see :mod:`vllmproxy.store.usage_lua`, for each
                                            MODEL END_USER, written as the length of MODEL in bytes, a colon, and both
    vllmproxy:{TOKEN}:usage:DAY:models      a set: those that have rows of their own
    vllmproxy:{TOKEN}:usage:DAY:end_users   a set, likewise

Version 1 had no ``keys`` and no ``audit``, version 2 none of what comes after these.
"""

from typing import Any, Final

from vllmproxy.store.interface import SCHEMA_VERSION

#: Those that :func:`migrate` brings up.
OLDER_VERSIONS: Final = (b"1", b"2")

SCHEMA_KEY: Final = b"vllmproxy:schema"
INDEX_KEY: Final = b"vllmproxy:keys"
AUDIT_KEY: Final = b"vllmproxy:audit"

# In pieces, so that Redis answers others in between. The last "created_at" of a row is its own: metadata comes
# before it, and in the texts after it a quote is escaped. cjson does not read every row.
_MIGRATE: Final = """
local scanned = redis.call('SCAN', ARGV[1], 'MATCH', 'vllmproxy:{*}:key', 'COUNT', 500)
for _, name in ipairs(scanned[2]) do
  if redis.call('TYPE', name)['ok'] == 'hash' then
    local row = redis.call('HGET', name, 'row') or ''
    local created = tonumber(string.match(row, '.*"created_at":([-+.%deE]+)')) or 0
    redis.call('ZADD', KEYS[1], string.format('%.17g', created), string.match(name, '^vllmproxy:{(.*)}:key$'))
  end
end
return scanned[1]
"""

_FINISH: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2]) end"


def key_name(token: bytes) -> bytes:
    """Return where the key with that id is kept."""
    return b"vllmproxy:{%b}:key" % token


def alias_name(alias: bytes) -> bytes:
    """Return where the token of the key with that alias is kept."""
    return b"vllmproxy:alias:" + alias


def account_name(token: bytes) -> bytes:
    """Return where the account of the key with that id is kept."""
    return b"vllmproxy:{%b}:budget" % token


def writer_name(writer: bytes) -> bytes:
    """Return where the last number of that writer is kept."""
    return b"vllmproxy:usage:writer:" + writer


def day_name(day: str) -> bytes:
    """Return where the keys are kept that have sums of that day."""
    return b"vllmproxy:usage:" + day.encode("ascii")


def sums_names(day: str, key: bytes) -> tuple[bytes, bytes, bytes]:
    """Return where a key's sums of that day are kept, and the models and the end users that have their own."""
    sums = b"vllmproxy:{%b}:usage:%b" % (key, day.encode("ascii"))
    return sums, sums + b":models", sums + b":end_users"


async def migrate(wire: Any, version: bytes) -> None:
    """Bring a store of an older version up; begun again from the start if it was interrupted, which does no harm.

    :param wire: a :class:`~vllmproxy.store.link.Wire`. Raises what it raises.
    """
    if version == b"1":
        cursor = b"0"
        while True:
            cursor = await wire.eval(_MIGRATE, [INDEX_KEY], [cursor])
            if cursor == b"0":
                break
    await wire.eval(_FINISH, [SCHEMA_KEY], [version, SCHEMA_VERSION])
