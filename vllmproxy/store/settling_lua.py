"""How Redis settles and renews what was reserved; how that is kept is said in :mod:`vllmproxy.store.limits_lua`."""

from typing import Final

from vllmproxy.store.limits_lua import LET_GO, STEADY
from vllmproxy.store.scripts import PUNCTUAL

#: KEYS: the reservations. ARGV: not after, milliseconds to remember that one is settled; of each its id, how many of
#: its units, and of each of these its number (empty where it is one request's), and in one text of each rule what was
#: used, or ``-`` where all was.
SETTLE: Final = (
    PUNCTUAL
    + """
local call, format = redis.call, string.format
local changes, ended = {}, {}
"""
    + LET_GO
    + """
local function add(name, bucket, change)
  changes[name] = changes[name] or {}
  changes[name][bucket] = (changes[name][bucket] or 0) + change
end

local function settle(request, taken, text)
  local words = string.gmatch(text, '%S+')
  for at = 1, #taken, 4 do
    local name, bucket, cost = taken[at], taken[at + 1], taken[at + 2]
    local change = (tonumber(words() or '') or cost) - cost
    if not bucket then
      ended[name] = ended[name] or {}
      table.insert(ended[name], request)
    elseif type(bucket) == 'number' then
      add(name, bucket, change)
    elseif tonumber(call('HGET', name, 'period') or -1) == taken[at + 3] then
      let_go(name, bucket, -change)
    end
  end
end

local place = 3
for _, reservation in ipairs(KEYS) do
  local id, count, asked, settled, written = ARGV[place], tonumber(ARGV[place + 1]), {'taken', 'units'}, {}, {}
  for at = place + 2, place + 2 * count, 2 do asked[#asked + 1] = 'u' .. ARGV[at] end
  local found = call('HMGET', reservation, unpack(asked))
  local taken, units = found[1] and cmsgpack.unpack(found[1]), tonumber(found[2])
  for number = 3, taken and #asked or 0 do
    local unit, text = ARGV[place + 2 * number - 4], ARGV[place + 2 * number - 3]
    local which = tonumber(unit)
    local is_there = unit == '' and units == 0
                     or which and which < units and format('%d', math.abs(which)) == unit
    if is_there and not found[number] and not settled[unit] then
      settled[unit] = true
      written[#written + 1] = asked[number]
      written[#written + 1] = ''
      settle(unit == '' and id or id .. ':' .. unit, taken, text)
    end
  end
  if #written > 0 then
    call('HSET', reservation, unpack(written))
    if call('HLEN', reservation) - 2 == math.max(units, 1) then call('PEXPIRE', reservation, ARGV[2]) end
  end
  place = place + 2 + 2 * count
end
for name, requests in pairs(ended) do call('ZREM', name, unpack(requests)) end
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
#: things; of each its id and its unit's number. Answers 1, now, those (from 0) that have no lease any more.
RENEW: Final = (
    PUNCTUAL
    + STEADY
    + """
local lease, kept = tonumber(ARGV[2]), ARGV[3]
local steady = steady_time(KEYS[1], now, kept)
local answer = {1, now}
for place = 2, #KEYS do
  local id, lost = ARGV[2 * place], true
  local found = call('HMGET', KEYS[place], 'taken', 'u' .. ARGV[2 * place + 1])
  if found[1] and not found[2] then
    local taken = cmsgpack.unpack(found[1])
    for at = 1, #taken, 4 do
      local name, bucket = taken[at], taken[at + 1]
      local ends = not bucket and call('ZSCORE', name, id)
      if ends and tonumber(ends) > steady then
        call('ZADD', name, steady + lease, id)
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
