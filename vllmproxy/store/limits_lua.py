"""How Redis reserves: what :mod:`vllmproxy.limits.window` and :mod:`vllmproxy.limits.leases` do, in Lua. How it settles
and renews is in :mod:`vllmproxy.store.settling_lua`.

A window is a hash: ``head`` and ``tail``, the numbers of the oldest and the newest bucket, ``start``, when the newest
began, ``total``, and for each bucket N ``tN``, when it took something last, and ``aN``, its amount; ``leaves`` is a
time before which the oldest does not leave: it may be missing, or too early. What is reserved for requests that come
later is taken when the last of them may come; ``latest`` is that time, and what is taken before it counts from it, too,
so that buckets leave in their order. Places are a hash: of each reservation that holds any, how many and when its lease
ends, ``:total``, how many that are, and ``:until``, when to look again for leases that have ended.
An account is a hash: ``period``, ``spend`` and ``tokens``, and what requests under way hold of it since ``day``, days
since the epoch, ``heldP`` and ``held_tokensP``, P being that day's number modulo 2, and since the day before it, with
the other P. What was held before that is held no more: it was lost with a proxy. A reservation is a hash: ``taken``,
what was taken for a request, or for each of several that are alike, ``units``, how many these are (0: it is one
request's), and once one of them is settled ``settled``, for each of them 1 or 0; only the proxy that made it reads it,
and one that holds of a budget is kept for a day, so that it can be given back that late. A request's id is the
reservation's, and that of one of several ``ID:N``: a lease is of all of these together. All times are microseconds.
What every script begins with is said in :mod:`vllmproxy.store.scripts`.
"""

from typing import Final

from vllmproxy.store.scripts import PUNCTUAL

#: What happened to a reservation: nothing; else for how many it was granted.
REFUSED: Final = 0
DUPLICATE: Final = -2

#: See :mod:`vllmproxy.limits.steady`. 'steady' is what everything but the answer goes by. Nearly always the clock has
#: gone on and was never set back: then what is to be kept is known before what was.
STEADY: Final = """
local call, format = redis.call, string.format

local function steady_time(name, now, kept)
  local last = call('SET', name, format('%d 0', now), 'PX', kept, 'GET')
  local latest, offset = string.match(last or '', '(%S+) (%S+)')
  local steady = math.max(now + tonumber(offset or 0), tonumber(latest or 0))
  if steady ~= now then call('SET', name, format('%d %d', steady, steady - now), 'PX', kept) end
  return steady
end
"""

#: Less is held of an account; never less than nothing. Where Redis's clock was set back, it may be held on the other
#: day than it was. Wants the local 'call'.
LET_GO: Final = """
local function let_go(account, field, amount)
  if amount == 0 then return end
  local left = call('HINCRBY', account, field, string.format('%d', -amount))
  if left >= 0 then return end
  local other = string.sub(field, 1, -2) .. (1 - string.sub(field, -1))
  left = left + (call('HGET', account, other) or 0)
  call('HSET', account, field, '0', other, string.format('%d', math.max(0, left)))
end
"""

# A key's clock is read once in a call; 'steady' is of the key whose request is being decided.
_CLOCK = """
local clocks, steady = {}, nil

local function clock_of(name)
  local clock = clocks[name]
  if not clock then
    local time = steady_time(name, now, kept)
    clock = {steady = time, now_text = format('%d', time)}
    clocks[name] = clock
  end
  steady = clock.steady
  return clock
end
"""

# What was read once holds for all requests of one call, and is written when all are decided.
_WINDOW = """
local windows = {}

local function prune(name, window)
  local first, leaves = window.head, nil
  while window.head <= window.tail do
    local time, amount = format('t%d', window.head), format('a%d', window.head)
    local bucket = call('HMGET', name, time, amount)
    leaves = bucket[1] + length
    if leaves > steady then break end
    window.total, leaves = window.total - bucket[2], nil
    call('HDEL', name, time, amount)
    window.head = window.head + 1
  end
  if window.head == first and not leaves then return end
  local head, total = format('%d', window.head), format('%d', window.total)
  call('HSET', name, 'head', head, 'total', total, 'leaves', format('%d', leaves or 0))
end

local function window_of(name, clock)
  local window = windows[name]
  if window then return window end
  local fields = call('HMGET', name, 'head', 'tail', 'start', 'total', 'leaves', 'latest')
  -- A new window's buckets have higher numbers than those of one that was here before.
  local head = tonumber(fields[1]) or math.floor(steady / width)
  window = {head = head, tail = tonumber(fields[2]) or head - 1, start = tonumber(fields[3]) or 0,
            total = tonumber(fields[4]) or 0, latest = tonumber(fields[6]) or 0, added = false, is_begun = false,
            clock = clock}
  if steady >= tonumber(fields[5] or 0) then prune(name, window) end
  windows[name] = window
  return window
end

local function write_window(name, window)
  local tail, total = format('%d', window.tail), format('%d', window.total)
  local added, began = format('%d', window.added), window.clock.now_text
  local last, counts_from = window.clock.steady + ahead, began
  if last <= window.latest then
    counts_from = format('%d', window.latest)
  elseif ahead > 0 then
    counts_from = format('%d', last)
    call('HSET', name, 'latest', counts_from)
  end
  if window.is_begun then
    local head = format('%d', window.head)
    call('HSET', name, 'head', head, 'tail', tail, 'start', began, 'total', total, 't' .. tail, counts_from,
         'a' .. tail, added)
    if head == tail then call('HSET', name, 'leaves', format('%d', window.clock.steady + length)) end
    -- Whatever is taken while this bucket is open has left before that.
    call('PEXPIRE', name, kept)
  else
    call('HSET', name, 'total', total, 't' .. tail, counts_from)
    call('HINCRBY', name, 'a' .. tail, added)
  end
  window.added, window.is_begun = false, false
end

local function wait(name, window, limit, cost)
  if window.added then write_window(name, window) end
  local excess, leaves, number = window.total + cost - limit, steady, window.head
  while excess > 0 do
    local bucket = call('HMGET', name, format('t%d', number), format('a%d', number))
    excess, leaves, number = excess - bucket[2], bucket[1] + length, number + 1
  end
  return leaves - steady
end
"""

#: Places as they are kept of each reservation. Wants the local 'call'.
HELD: Final = """
local function held(count, ends)
  return string.format('%d %d', count, ends)
end

local function read_held(text)
  local count, ends = string.match(text or '', '(%d+) (%d+)')
  return tonumber(count), tonumber(ends)
end

local function held_by(name, id)
  return read_held(call('HGET', name, id))
end
"""

# As of the windows. A lease that is renewed ends later than it was to, so that all are looked through now and then. Of
# more than a thousand, not for each that ends: so long after the last time as it takes Redis thirty times, about.
_PLACES = """
local places = {}

local function clear(name, found)
  found.total, found.ends, found.is_changed = 0, math.huge, true
  local all = call('HGETALL', name)
  local soonest = #all > 2000 and steady + #all * 12.5 or 0
  for at = 1, #all, 2 do
    local count, ends = read_held(all[at + 1])
    if not count then
      -- It is no reservation's.
    elseif ends > steady then
      found.total, found.ends = found.total + count, math.min(found.ends, ends)
    else
      call('HDEL', name, all[at])
    end
  end
  found.ends = math.max(found.ends, soonest)
end

local function places_of(name, clock)
  local found = places[name]
  if found then return found end
  local fields = call('HMGET', name, ':total', ':until')
  found = {total = tonumber(fields[1] or 0), ends = tonumber(fields[2]) or math.huge, clock = clock, is_changed = false}
  if steady >= found.ends then clear(name, found) end
  places[name] = found
  return found
end

local function write_places(name, found)
  local ends = math.min(found.ends, found.clock.steady + lease)
  call('HSET', name, ':total', format('%d', found.total), ':until', format('%d', ends), unpack(found))
  call('PEXPIRE', name, kept)
end
"""

#: A period that begins later is ahead of this clock: it follows on no other, and gives way to the one before.
LATEST: Final = "local latest = now / 1000000 + 60\n"

# Kind of rule → what it counts of an account, and what it holds there. ``held`` and ``held_tokens`` are of ``day``,
# ``earlier`` and ``earlier_tokens`` of the day before.
_ACCOUNT = """
local spent = {budget = 'spend', budget_tokens = 'tokens'}
local holds = {budget = 'held', budget_tokens = 'held_tokens'}
local held_earlier = {budget = 'earlier', budget_tokens = 'earlier_tokens'}
local accounts, today, day_long = {}, math.floor(now / 86400000000), '86400000'

local function account_of(name, period)
  local account = accounts[name]
  if not account then
    local fields = call('HMGET', name, 'period', 'spend', 'tokens', 'day', 'held0', 'held_tokens0', 'held1',
                        'held_tokens1')
    local day, this, other = tonumber(fields[4] or 0), 5 + 2 * (today % 2), 7 - 2 * (today % 2)
    account = {period = tonumber(fields[1]) or -1, spend = tonumber(fields[2] or 0), tokens = tonumber(fields[3] or 0),
               held = 0, held_tokens = 0, earlier = 0, earlier_tokens = 0, is_begun = false, is_rolled = day ~= today,
               is_changed = false}
    if day >= today then
      account.held, account.held_tokens = tonumber(fields[this] or 0), tonumber(fields[this + 1] or 0)
    end
    if day >= today - 1 then
      account.earlier, account.earlier_tokens = tonumber(fields[other] or 0), tonumber(fields[other + 1] or 0)
    end
    if day > today then  -- the clock was set back: all of it counts from today on
      account.held, account.earlier = account.held + account.earlier, 0
      account.held_tokens, account.earlier_tokens = account.held_tokens + account.earlier_tokens, 0
    end
    accounts[name] = account
  end
  local follows = period > account.period and (period <= latest or account.period < 0)
  if follows or (period < account.period and account.period > latest) then
    account.period, account.spend, account.tokens, account.is_begun = period, 0, 0, true
    account.held, account.held_tokens, account.earlier, account.earlier_tokens = 0, 0, 0, 0
  end
  return account
end

local function write_account(name, account)
  local this, other = today % 2, 1 - today % 2
  if account.is_begun then
    call('HSET', name, 'period', format('%d', account.period), 'spend', '0', 'tokens', '0')
  end
  if account.is_begun or account.is_rolled then
    call('HSET', name, 'day', format('%d', today), 'held' .. other, format('%d', account.earlier),
         'held_tokens' .. other, format('%d', account.earlier_tokens))
  elseif not account.is_changed then
    return
  end
  call('HSET', name, 'held' .. this, format('%d', account.held), 'held_tokens' .. this,
       format('%d', account.held_tokens))
end
"""

_ONE = """
local known, reserved = {}, {}

local function reserve(from, id, units, rules)
  local one_of = units > 0
  units = math.max(units, 1)
  if known[KEYS[from + 1]] or call('EXISTS', KEYS[from + 1]) == 1 then return {-2} end
  known[KEYS[from + 1]] = true
  local clock = clock_of(KEYS[from])
  local count, used, longest, refusing = #rules / 5, {}, 0, nil
  for place = 1, count do
    local name, at, delay = KEYS[from + 1 + place], 5 * place - 4, 0
    local kind, limit, least = rules[at], rules[at + 1], rules[at + 4]
    if least > limit then
      delay, used[place] = math.huge, 0
    elseif holds[kind] then
      local account = account_of(name, rules[at + 3])
      used[place] = account[spent[kind]] + account[holds[kind]] + account[held_earlier[kind]]
      if used[place] + least > limit then delay = math.huge end
    elseif kind == 'max_parallel_requests' then
      used[place] = places_of(name, clock).total
      if used[place] >= limit then delay = pause end
    else
      local window = window_of(name, clock)
      used[place] = window.total
      if window.total + least > limit then delay = wait(name, window, limit, least) end
    end
    if delay > longest then longest, refusing = delay, place end
  end
  if refusing then
    local left = math.max(0, rules[5 * refusing - 3] - used[refusing])
    if longest == math.huge then return {0, refusing - 1, length, 1, left} end
    return {0, refusing - 1, longest, 0, left}
  end

  for place = 1, units > 1 and count or 0 do
    local limit, cost = rules[5 * place - 3], rules[5 * place - 2]
    if cost > 0 then units = math.min(units, math.floor((limit - used[place]) / cost)) end
  end

  local taken, answer, remembered, held_on = {}, {units}, kept, 0
  for place = 1, count do
    local name, at, bucket = KEYS[from + 1 + place], 5 * place - 4, false
    local kind, left, period = rules[at], rules[at + 1] - used[place], rules[at + 3]
    local cost = math.min(rules[at + 2], math.max(left, rules[at + 4]))
    local all = units * cost
    if holds[kind] then
      local account = accounts[name]
      if period > latest then period = account.period end
      if account.period == period then account[holds[kind]] = account[holds[kind]] + all end
      account.is_changed, bucket = true, holds[kind] .. today % 2
      remembered, held_on = day_long, today
    elseif kind == 'max_parallel_requests' then
      local found = places[name]
      found.total, found.is_changed = found.total + units, true
      found[#found + 1] = id
      found[#found + 1] = held(units, steady + lease)
    else
      local window = windows[name]
      if window.head > window.tail or steady >= window.start + width then
        window.tail, window.start, window.is_begun = window.tail + 1, steady, true
      end
      window.total, window.added = window.total + all, (window.added or 0) + all
      bucket = window.tail
    end
    taken[4 * place - 3] = name
    taken[4 * place - 2] = bucket
    taken[4 * place - 1] = cost
    taken[4 * place] = period
    answer[place + 1] = math.max(0, left - all)
    answer[place + 1 + count] = cost
  end
  answer[2 * count + 2] = held_on
  reserved[#reserved + 1] = {KEYS[from + 1], cmsgpack.pack(taken), one_of and units or 0, remembered}
  return answer
end
"""

#: Requests, in order. KEYS: of each its key's clock, the reservation and each rule's counter. ARGV: not after; the
#: lengths of window, bucket, lease and pause; milliseconds to keep things; how much later the requests may come; of
#: each its id, how many are alike (0: it is one, without a unit), and as one list in JSON of each of its rules the
#: kind, limit, cost, period and the least that will do. Answers 1, now, and of each: for how many it was granted (what
#: fits), what remains of each rule after all of these, what was taken of each for one, the day that a budget holds it
#: on; or REFUSED, which rule (from 0), wait, 1 if that is for ever, what is left of it; or DUPLICATE.
RESERVE: Final = (
    PUNCTUAL
    + """
local length, width, lease, pause = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local kept, ahead = ARGV[6], tonumber(ARGV[7])
"""
    + STEADY
    + _CLOCK
    + _WINDOW
    + HELD
    + _PLACES
    + LATEST
    + _ACCOUNT
    + _ONE
    + """
local answers, from = {1, now}, 1
for place = 8, #ARGV, 3 do
  local rules = cjson.decode(ARGV[place + 2])
  answers[#answers + 1] = reserve(from, ARGV[place], tonumber(ARGV[place + 1]), rules)
  from = from + 2 + #rules / 5
end
for name, window in pairs(windows) do
  if window.added then write_window(name, window) end
end
for name, found in pairs(places) do
  if found.is_changed then write_places(name, found) end
end
for name, account in pairs(accounts) do write_account(name, account) end
for _, each in ipairs(reserved) do
  call('HSET', each[1], 'taken', each[2], 'units', each[3])
  call('PEXPIRE', each[1], each[4])
end
return answers
"""
)
