"""Names and versions of what is kept in Redis.

::

    vllmproxy:schema            the version of this layout
    vllmproxy:{TOKEN}:key       a hash: row (JSON)
    vllmproxy:alias:ALIAS       the token
    vllmproxy:keys              a sorted set: tokens by the time that their keys were made
    vllmproxy:audit             a stream: an entry (JSON) for each management call

Version 1 had no ``keys`` and no ``audit``.
"""

from typing import Any, Final

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

_FINISH: Final = "if redis.call('GET', KEYS[1]) == '1' then redis.call('SET', KEYS[1], '2') end"


def key_name(token: bytes) -> bytes:
    """Return where the key with that id is kept."""
    return b"vllmproxy:{%b}:key" % token


def alias_name(alias: bytes) -> bytes:
    """Return where the token of the key with that alias is kept."""
    return b"vllmproxy:alias:" + alias


async def migrate(wire: Any) -> None:
    """Bring a store of version 1 up to 2; begun again from the start if it was interrupted, which does no harm.

    :param wire: a :class:`~vllmproxy.store.link.Wire`. Raises what it raises.
    """
    cursor = b"0"
    while True:
        cursor = await wire.eval(_MIGRATE, [INDEX_KEY], [cursor])
        if cursor == b"0":
            break
    await wire.eval(_FINISH, [SCHEMA_KEY], [])
