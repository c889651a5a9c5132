"""How Redis settles and renews what was reserved; how that is kept is said in :mod:`vllmproxy.store.limits_lua`."""

from typing import Final

from vllmproxy.store.limits_lua import HELD, LET_GO, STEADY
from vllmproxy.store.scripts import PUNCTUAL

#: KEYS: the reservations. ARGV: not after, milliseconds to remember that one is settled; of each its id, and as one
#: list in JSON the numbers of its units (-1: it is one request's), and for each rule what each of them used (-1: what
#: was taken), or false where that goes for all.
SETTLE: Final = (
    PUNCTUAL
    + """
local call, format = redis.call, string.format
local changes = {}
"""
    + LET_GO
    + HELD
    + """
local function add(name, bucket, change)
  changes[name] = changes[name] or {}
  changes[name][bucket] = (changes[name][bucket] or 0) + change
end

-- What those at 'fresh' used beyond what was taken for each of them.
local function excess(used, fresh, cost)
  local sum = 0
  for _, at in ipairs(used and fresh or {}) do
    if used[at] >= 0 then sum = sum + used[at] - cost end
  end
  return sum
end

-- So many of one reservation have ended, the last of them if 'is_over'. Where it has no places, its lease is over.
local function leave(name, id, count, is_over)
  if is_over then
    if call('HDEL', name, id) == 1 then call('HINCRBY', name, ':total', -count) end
    return
  end
  local left, ends = held_by(name, id)
  if left then
    call('HSET', name, id, held(left - count, ends))
    call('HINCRBY', name, ':total', -count)
  end
end

local function settle(id, taken, told, fresh, is_over)
  for at = 1, #taken, 4 do
    local name, bucket, cost = taken[at], taken[at + 1], taken[at + 2]
    local change = bucket and excess(told[(at + 7) / 4], fresh, cost)
    if not bucket then
      leave(name, id, #fresh, is_over)
    elseif type(bucket) == 'number' then
      add(name, bucket, change)
    elseif change ~= 0 and tonumber(call('HGET', name, 'period') or -1) == taken[at + 3] then
      let_go(name, bucket, -change)
    end
  end
end

local place = 3
for _, reservation in ipairs(KEYS) do
  local id, told = ARGV[place], cjson.decode(ARGV[place + 1])
  local units, found, fresh = told[1], call('HMGET', reservation, 'taken', 'units', 'settled'), {}
  if found[1] then
    local count = tonumber(found[2])
    local first = count == 0 and 2 or 1
    local settled = {string.byte(found[3] or string.rep('0', math.max(count, 1)), 1, -1)}
    for at, unit in ipairs(units) do
      if settled[unit + first] == 48 then
        settled[unit + first] = 49
        fresh[#fresh + 1] = at
      end
    end
    if #fresh > 0 then
      local written = string.char(unpack(settled))
      call('HSET', reservation, 'settled', written)
      local is_over = not string.find(written, '0', 1, true)
      if is_over then call('PEXPIRE', reservation, ARGV[2]) end
      settle(id, cmsgpack.unpack(found[1]), told, fresh, is_over)
    end
  end
  place = place + 2
end
for name, buckets in pairs(changes) do
  for bucket, change in pairs(buckets) do
    local field, by = format('a%d', bucket), format('%d', change)
    if change == 0 then
      -- It was as expected.
    elseif call('HINCRBY', name, field, by) == change and call('HEXISTS', name, format('t%d', bucket)) == 0 then
      -- One that is nothing but the change has left; it is not to come back.
      call('HDEL', name, field)
    else
      call('HINCRBY', name, 'total', by)
    end
  end
end
return {1, now}
"""
)

#: KEYS: the key's clock, of each request its reservation. ARGV: not after, the length of a lease, milliseconds to keep
#: things; of each its reservation's id and its unit's number (-1: it has none). Answers 1, now, those (from 0) that
#: have no lease any more.
RENEW: Final = (
    PUNCTUAL
    + STEADY
    + HELD
    + """
local lease, kept = tonumber(ARGV[2]), ARGV[3]
local steady = steady_time(KEYS[1], now, kept)
local answer = {1, now}
for place = 2, #KEYS do
  local id, lost = ARGV[2 * place], true
  local found = call('HMGET', KEYS[place], 'taken', 'units', 'settled')
  local flag = ARGV[2 * place + 1] + (found[2] == '0' and 2 or 1)
  if found[1] and string.byte(found[3] or '', flag) ~= 49 then
    local taken = cmsgpack.unpack(found[1])
    for at = 1, #taken, 4 do
      local name, bucket = taken[at], taken[at + 1]
      local count, ends
      if not bucket then count, ends = held_by(name, id) end
      if ends and ends > steady then
        call('HSET', name, id, held(count, steady + lease))
        call('PEXPIRE', name, kept)
        lost = false
      end
    end
  end
  if lost then
    answer[#answer + 1] = place - 2
  elseif call('PTTL', KEYS[place]) < tonumber(kept) then
    call('PEXPIRE', KEYS[place], kept)
  end
end
return answer
"""
)
