"""Sums and accounts as Redis does them: what :mod:`vllmproxy.usage.ledger` does, in Lua.

A key's sums of one day are a hash: for each model and end user the sum's numbers, with spaces in between. All add up
exactly to 2^53, and beyond that without an error, which would leave half of a script undone. What every script begins
with is said in :mod:`vllmproxy.store.scripts`.
"""

from typing import Final

from vllmproxy.store.limits_lua import LATEST, LET_GO
from vllmproxy.store.scripts import PUNCTUAL

#: What happened.
DONE: Final = 1
OVERLAP: Final = 2

#: KEYS: the writer; for each key and day the day's keys, the sums, the names of its models and of its end users; the
#: accounts. ARGV: not after; the number of the first event, how many; seconds to keep the writer and the sums; how
#: many models and end users have sums of their own, and the name of all others; how many keys and days. For each of
#: these the key, how many rows, and of each row model, end user, numbers; for each account period, spend, tokens, how
#: many days, and of each of these (its number since the epoch) what was held of money and of tokens. Answers DONE, now,
#: and for each sums or account that not all could be added to, as they hold something else, say, its name and why in
#: turn; or OVERLAP, now, the last number that was added, where it is not before the first.
ADD: Final = (
    PUNCTUAL
    + """
local first, count, writer_kept, kept = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5]
local most_models, most_end_users, other, keydays = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8], tonumber(ARGV[9])
local last = tonumber(redis.call('GET', KEYS[1]) or 0)
if last >= first then
  redis.call('EXPIRE', KEYS[1], writer_kept)
  return {2, now, last}
end
redis.call('SET', KEYS[1], string.format('%.0f', first + count - 1), 'EX', writer_kept)

local call = redis.call

local function text(number)
  return string.format(number < 9007199254740992 and '%d' or '%.0f', number)
end

local function bounded(known, name, most)
  if name == '' then return name end
  if call('SCARD', known) < most then
    call('SADD', known, name)
    return name
  end
  return call('SISMEMBER', known, name) == 1 and name or other
end

local function added(before, numbers)
  local sums, earlier = {}, string.gmatch(before, '%d+')
  for number in string.gmatch(numbers, '%d+') do
    local sum = earlier() or '0'
    sums[#sums + 1] = number == '0' and sum or text(sum + number)
  end
  return table.concat(sums, ' ')
end

local function add_rows(name, arg, rows)
  local day, sums, models, end_users = unpack(KEYS, name + 1, name + 4)
  local key, is_known = ARGV[arg + 1], true
  arg = arg + 2
  for _ = 1, rows do
    local model, end_user = ARGV[arg + 1], ARGV[arg + 2]
    local row = #model .. ':' .. model .. end_user
    local before = call('HGET', sums, row)
    -- Where there is a row, its names have rows of their own, unless it may be everybody's.
    if not before or model == other or end_user == other then
      is_known = false
      model, end_user = bounded(models, model, most_models), bounded(end_users, end_user, most_end_users)
      row = #model .. ':' .. model .. end_user
      before = call('HGET', sums, row)
    end
    call('HSET', sums, row, before and added(before, ARGV[arg + 3]) or ARGV[arg + 3])
    arg = arg + 3
  end
  for place = name + 2, name + 4 do call('EXPIRE', KEYS[place], kept) end
  if not is_known then call('SADD', day, key) end
  call('EXPIRE', day, kept)
end

local charged = {'spend', 'tokens'}
"""
    + LET_GO
    + LATEST
    + """
local function charge(account, arg, days)
  local period = tonumber(ARGV[arg + 1])
  local fields = call('HMGET', account, 'period', 'spend', 'tokens')
  local current = tonumber(fields[1] or -1)
  if period > latest and current >= 0 then period = current end
  if period > current then
    call('HSET', account, 'period', ARGV[arg + 1], 'spend', ARGV[arg + 2], 'tokens', ARGV[arg + 3])
    call('HDEL', account, 'held0', 'held_tokens0', 'held1', 'held_tokens1')
    -- What a key used that was deleted meanwhile is not to be kept for ever.
    if current < 0 and call('EXISTS', (string.gsub(account, ':budget$', ':key'))) == 0 then
      call('EXPIRE', account, kept)
    end
  elseif period == current then
    for number, field in ipairs(charged) do
      local amount = ARGV[arg + 1 + number]
      if amount ~= '0' then call('HSET', account, field, text((fields[number + 1] or 0) + amount)) end
    end
    local latest = days > 0 and tonumber(call('HGET', account, 'day') or 0)
    for at = arg + 5, arg + 2 + 3 * days, 3 do
      local day = tonumber(ARGV[at])
      if day >= latest - 1 then  -- what was held before that is held no more
        local side = math.min(day, latest) % 2
        let_go(account, 'held' .. side, tonumber(ARGV[at + 1]))
        let_go(account, 'held_tokens' .. side, tonumber(ARGV[at + 2]))
      end
    end
  end
end

-- Garbage at one place is not to cost what is added at the others: it would not be added again.
local answer, name, arg = {1, now}, 1, 9

local function note(where, is_added, why)
  if is_added then return end
  answer[#answer + 1] = where
  answer[#answer + 1] = type(why) == 'table' and why.err or why
end

for _ = 1, keydays do
  local rows = tonumber(ARGV[arg + 2])
  note(KEYS[name + 2], pcall(add_rows, name, arg, rows))
  name, arg = name + 4, arg + 2 + 3 * rows
end
for place = name + 1, #KEYS do
  local days = tonumber(ARGV[arg + 4])
  note(KEYS[place], pcall(charge, KEYS[place], arg, days))
  arg = arg + 4 + 3 * days
end
return answer
"""
)

#: KEYS: the writer. Answers the last number that was added.
LAST: Final = PUNCTUAL + "return {1, now, tonumber(redis.call('GET', KEYS[1]) or 0)}"

#: KEYS: the writer.
FORGET: Final = PUNCTUAL + "return {1, now, redis.call('DEL', KEYS[1])}"

#: KEYS: a day's keys. ARGV: not after, a cursor. Answers the next cursor, '0' at the end, and keys.
KEYS_OF_DAY: Final = PUNCTUAL + "return {1, now, unpack(redis.call('SSCAN', KEYS[1], ARGV[2], 'COUNT', 1000))}"

#: KEYS: sums. ARGV: not after, a cursor into the first, about how many rows to read. Answers the next cursor and (as
#: JSON, which is read much faster) the rows and their numbers in turn, of each that was read; unless the cursor is
#: '0', the last of these is not at its end.
SUMS: Final = (
    PUNCTUAL
    + """
local cursor, most, found, all = ARGV[2], tonumber(ARGV[3]), 0, {}
for place, name in ipairs(KEYS) do
  local rows = {}
  repeat
    local scanned = redis.call('HSCAN', name, cursor, 'COUNT', 500)
    cursor = scanned[1]
    for _, text in ipairs(scanned[2]) do rows[#rows + 1] = text end
    found = found + #scanned[2] / 2
  until cursor == '0' or found >= most
  all[place] = rows
  if found >= most then break end
end
return {1, now, cursor, cjson.encode(all)}
"""
)

#: KEYS: an account. Answers period, spend and tokens.
ACCOUNT: Final = PUNCTUAL + "return {1, now, unpack(redis.call('HMGET', KEYS[1], 'period', 'spend', 'tokens'))}"
