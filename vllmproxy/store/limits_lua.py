"""The limits as Redis does them: what :mod:`vllmproxy.limits.window` and :mod:`vllmproxy.limits.leases` do, in Lua.

A window is a hash: ``head`` and ``tail``, the numbers of the oldest and the newest bucket, ``start``, when the newest
began, ``total``, and for each bucket N ``tN``, when it took something last, and ``aN``, its amount. Places are a sorted
set of request ids by the end of their lease. An account is a hash: ``period``, ``spend`` and ``tokens``, and what
requests under way hold of it, ``held`` and ``held_tokens``; ``touched`` is when something was held last: what nobody
let go of within a day was lost with a proxy. A reservation is what was taken for one request, empty once it is settled.
All times are microseconds. What every script begins with is said in :mod:`vllmproxy.store.scripts`.
"""

from typing import Final

from vllmproxy.store.scripts import PUNCTUAL

#: What happened: DUPLICATE is nothing, as are REFUSED and LATE.
REFUSED: Final = 0
GRANTED: Final = 1
DUPLICATE: Final = -2

# See vllmproxy.limits.steady. 'steady' is what everything but the answer goes by.
_STEADY = """
local function steady_time(name, now, kept)
  local latest, offset = string.match(redis.call('GET', name) or '', '(%S+) (%S+)')
  local steady = math.max(now + tonumber(offset or 0), tonumber(latest or 0))
  redis.call('SET', name, string.format('%.0f %.0f', steady, steady - now), 'PX', kept)
  return steady
end
"""

_WINDOW = """
local function load(name, length, width, now)
  local fields = redis.call('HMGET', name, 'head', 'tail', 'start', 'total')
  -- A new window's buckets have higher numbers than those of one that was here before.
  local head = tonumber(fields[1]) or math.floor(now / width)
  local window = {name = name, head = head, tail = tonumber(fields[2]) or head - 1,
                  start = tonumber(fields[3]) or 0, total = tonumber(fields[4]) or 0}
  local first = head
  while window.head <= window.tail do
    local bucket = redis.call('HMGET', name, 't' .. window.head, 'a' .. window.head)
    if bucket[1] + length > now then break end
    window.total = window.total - bucket[2]
    redis.call('HDEL', name, 't' .. window.head, 'a' .. window.head)
    window.head = window.head + 1
  end
  if window.head > first then redis.call('HSET', name, 'head', window.head, 'total', window.total) end
  return window
end

local function wait(window, length, now, limit, cost)
  local excess, leaves, number = window.total + cost - limit, now, window.head
  while excess > 0 do
    local bucket = redis.call('HMGET', window.name, 't' .. number, 'a' .. number)
    excess, leaves, number = excess - bucket[2], bucket[1] + length, number + 1
  end
  return leaves - now
end

local function take(window, width, now, cost)
  if window.head > window.tail or now >= window.start + width then
    window.tail, window.start = window.tail + 1, now
  end
  window.total = window.total + cost
  redis.call('HSET', window.name, 'head', window.head, 'tail', window.tail, 'start', window.start,
             'total', window.total, 't' .. window.tail, now)
  redis.call('HINCRBY', window.name, 'a' .. window.tail, cost)
  return window.tail
end
"""

# Kind of rule → what it counts of an account, and what it holds there.
_ACCOUNT = """
local spent = {budget = 'spend', budget_tokens = 'tokens'}
local holds = {budget = 'held', budget_tokens = 'held_tokens'}
local forgotten = 86400000000

local function begin(name, period, now)
  local fields = redis.call('HMGET', name, 'period', 'touched')
  local current = tonumber(fields[1]) or -1
  if period > current then
    redis.call('HSET', name, 'period', period, 'spend', 0, 'tokens', 0, 'held', 0, 'held_tokens', 0)
    return period
  end
  if now - tonumber(fields[2] or 0) > forgotten then redis.call('HSET', name, 'held', 0, 'held_tokens', 0) end
  return current
end

local function used_of(name, kind)
  local fields = redis.call('HMGET', name, spent[kind], holds[kind])
  return tonumber(fields[1] or 0) + tonumber(fields[2] or 0)
end
"""

# A window that was loaded once holds for all requests of one call.
_ONE = """
local windows = {}

local function window_of(name, length, width, steady)
  windows[name] = windows[name] or load(name, length, width, steady)
  return windows[name]
end

local function reserve(reservation, id, words, from)
  if redis.call('EXISTS', reservation) == 1 then return {-2} end
  local rules, longest, refusing = {}, 0, nil
  for at = 1, #words, 5 do
    local rule = {name = KEYS[from + #rules], kind = words[at], limit = tonumber(words[at + 1]),
                  cost = tonumber(words[at + 2]), period = tonumber(words[at + 3]), least = tonumber(words[at + 4])}
    local delay = 0
    if rule.least > rule.limit then
      delay, rule.used = math.huge, 0
    elseif holds[rule.kind] then
      rule.is_current = begin(rule.name, rule.period, now) == rule.period
      rule.used = used_of(rule.name, rule.kind)
      if rule.used + rule.least > rule.limit then delay = math.huge end
    elseif rule.kind == 'max_parallel_requests' then
      redis.call('ZREMRANGEBYSCORE', rule.name, '-inf', steady)
      rule.used = redis.call('ZCARD', rule.name)
      if rule.used >= rule.limit then delay = pause end
    else
      rule.window = window_of(rule.name, length, width, steady)
      rule.used = rule.window.total
      delay = wait(rule.window, length, steady, rule.limit, rule.least)
    end
    if delay > longest then longest, refusing = delay, #rules end
    rules[#rules + 1] = rule
  end
  if refusing then
    local left = math.max(0, rules[refusing + 1].limit - rules[refusing + 1].used)
    if longest == math.huge then return {0, refusing, length, 1, left} end
    return {0, refusing, longest, 0, left}
  end

  local taken, answer = {}, {1}
  for place, rule in ipairs(rules) do
    local bucket = false
    local cost = math.min(rule.cost, math.max(rule.limit - rule.used, rule.least))
    if holds[rule.kind] then
      bucket = holds[rule.kind]
      if rule.is_current then redis.call('HINCRBY', rule.name, bucket, cost) end
      redis.call('HSET', rule.name, 'touched', now)
    elseif rule.window then
      bucket = take(rule.window, width, steady, cost)
      redis.call('PEXPIRE', rule.name, kept)
    else
      redis.call('ZADD', rule.name, steady + lease, id)
      redis.call('PEXPIRE', rule.name, kept)
    end
    taken[place] = {rule.name, bucket, cost, rule.period}
    answer[place + 1] = math.max(0, rule.limit - rule.used - cost)
    answer[place + 1 + #rules] = cost
  end
  redis.call('SET', reservation, cmsgpack.pack(taken), 'PX', kept)
  return answer
end
"""

#: Requests of one key, in order. KEYS: the key's clock; of each request the reservation and each rule's counter. ARGV:
#: not after; in one text the lengths of window, bucket, lease and pause, and milliseconds to keep things; of each
#: request its id, and in one text of each of its rules the kind, limit, cost, period and the least that will do.
#: Answers GRANTED, now, and of each request: GRANTED, what remains of each rule, what was taken of each; or REFUSED,
#: which rule (from 0), wait, 1 if that is for ever, what is left of it; or DUPLICATE.
RESERVE: Final = (
    PUNCTUAL
    + """
local function split(text)
  local words = {}
  for word in string.gmatch(text, '%S+') do words[#words + 1] = word end
  return words
end
local lengths = split(ARGV[2])
local length, width = tonumber(lengths[1]), tonumber(lengths[2])
local lease, pause, kept = tonumber(lengths[3]), tonumber(lengths[4]), lengths[5]
"""
    + _STEADY
    + "local steady = steady_time(KEYS[1], now, kept)"
    + _WINDOW
    + _ACCOUNT
    + _ONE
    + """
local answers, from = {1, now}, 2
for place = 3, #ARGV, 2 do
  local words = split(ARGV[place + 1])
  answers[#answers + 1] = reserve(KEYS[from], ARGV[place], words, from + 1)
  from = from + 1 + #words / 5
end
return answers
"""
)

#: KEYS: the reservations. ARGV: not after, milliseconds to remember that one is settled; of each its request id, and in
#: one text of each rule what was used, or ``-`` where all was.
SETTLE: Final = (
    PUNCTUAL
    + """
local function settle(reservation, id, text)
  local taken = redis.call('GET', reservation)
  if not taken or taken == '' then return end
  redis.call('SET', reservation, '', 'PX', ARGV[2])
  local words = string.gmatch(text, '%S+')
  for _, rule in ipairs(cmsgpack.unpack(taken)) do
    local name, bucket, cost, period = rule[1], rule[2], rule[3], rule[4]
    local used = tonumber(words() or '')
    if not bucket then
      redis.call('ZREM', name, id)
    elseif type(bucket) == 'string' then
      if used and tonumber(redis.call('HGET', name, 'period') or -1) == period then
        redis.call('HINCRBY', name, bucket, used - cost)
      end
    elseif used and redis.call('HEXISTS', name, 'a' .. bucket) == 1 then
      redis.call('HINCRBY', name, 'a' .. bucket, used - cost)
      redis.call('HINCRBY', name, 'total', used - cost)
    end
  end
end
for place, reservation in ipairs(KEYS) do settle(reservation, ARGV[2 * place + 1], ARGV[2 * place + 2]) end
return {1, now}
"""
)

#: KEYS: the key's clock, the reservations. ARGV: not after, the length of a lease, milliseconds to keep things, the
#: request ids. Answers GRANTED, now, those (from 0) that have no lease any more.
RENEW: Final = (
    PUNCTUAL
    + _STEADY
    + """
local lease, kept = tonumber(ARGV[2]), ARGV[3]
local steady = steady_time(KEYS[1], now, kept)
local answer = {1, now}
for place = 2, #KEYS do
  local id, lost = ARGV[place + 2], true
  local reservation = redis.call('GET', KEYS[place])
  if reservation and reservation ~= '' then
    for _, rule in ipairs(cmsgpack.unpack(reservation)) do
      local name, bucket = rule[1], rule[2]
      local ends = not bucket and redis.call('ZSCORE', name, id)
      if ends and tonumber(ends) > steady then
        redis.call('ZADD', name, steady + lease, id)
        redis.call('PEXPIRE', name, kept)
        lost = false
      end
    end
  end
  if lost then
    answer[#answer + 1] = place - 2
  else
    redis.call('PEXPIRE', KEYS[place], kept)
  end
end
return answer
"""
)
