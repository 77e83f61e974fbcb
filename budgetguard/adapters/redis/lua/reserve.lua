-- Admits one call or says why not, all or nothing. The reference is `reserve` in core/reserving.py.
--
-- KEYS  1 epoch  2 tenant  3 API key  4 operation  5 leases  6 usage stream  7 tenant's requests  8 key's requests
--       9... one counter a limit, in the order in which a refusal names them: calls, tokens, budgets; then the subjects
--       of each template
-- ARGV  1 now (ms)  2 facts (JSON)  3 asked: what was asked for, to tell a repeated question from another one
--       4 tenant's version  5 key's version  6 most undrained events  7 tenant's requests a minute  8 key's (0: no limit)
--       9 input nanos  10 whole hold  11 smallest hold  12 nanos a token  13 wanted tokens  14 fewest tokens
--       15 share of what is left that the output may take at most (0: all of it)  16 lease member  17 lease until (ms)
--       18 counter names  19 how far Redis' clock may be past now (ms)  20 input tokens  21 choices
--       22 number of counters  23 the limit of each and whose it is, a line each, as extend.lua reads them
--       24... for each: its shape (unit, '1' when enforced, '1' when it is kept longer with each use, '1' when it rolls),
--       kept until (ms, or ''), limit, budget id; and if it rolls: bucket, number of buckets, milliseconds of one
--       then for each template: the number of its counter, subject, most subjects, since when one must have been seen (ms)

-- An argument costs as much as two reads of a hash's field: few of them.
local FIRST_COUNTER, FIRST_LIMIT, LIMIT_WIDTH, ROLLING_WIDTH, TEMPLATE_WIDTH = 9, 24, 4, 7, 4
local YES, MONEY = 49, 110 -- '1' and NANOS, as string.byte says them
local UNBOUNDED_TOKENS = 1024 -- UNBOUNDED_TOKENS in core/budget.py

if not ready(KEYS[1]) then
  return { 'NOT_READY' }
end

local now = tonumber(ARGV[1])
local clock = redis.call('TIME')
if clock[1] * 1000 + math.floor(clock[2] / 1000) > now + tonumber(ARGV[19]) then
  return { 'TOO_LATE' } -- its caller has given up
end

local known = read_operation(KEYS[4])
if known then
  if known.state == HELD and known.facts == ARGV[2] and known.asked == ARGV[3] then
    local told = split(known.told, PART)
    return { 'RESERVED', told[1], told[2], known.counters, unpack(told, 3) }
  end
  return { 'REPLAYED' }
end

local tenant_version = redis.call('HGET', KEYS[2], 'version')
if not tenant_version then
  return { 'NOT_READY' } -- callers know the tenant from here, so Redis has lost it
end
if tenant_version ~= ARGV[4] then
  return { 'STALE', 'TENANT' }
end
if redis.call('HGET', KEYS[3], 'version') ~= ARGV[5] then
  return { 'STALE', 'API_KEY' }
end

if redis.call('XLEN', KEYS[6]) >= tonumber(ARGV[6]) then
  return { 'BACKLOG_FULL' }
end

-- Requests a minute: 60 buckets of a second beside their sum. A bucket leaves the sum when it is wholly past.
local function look(key, limit, scope)
  local seen = redis.call('HMGET', key, 'total', 'first', 'last')
  local requests = {
    key = key, limit = limit, scope = scope, past = {}, total = 0, last = tonumber(seen[3] or 0),
    second = math.floor(now / 1000),
  }
  -- A caller whose clock is behind counts into the newest second, so that buckets never lie before `first`.
  requests.second = math.max(requests.second, requests.last)
  local live_from = requests.second - 59
  requests.first = math.max(tonumber(seen[2] or 0), live_from)
  if requests.last < live_from then
    requests.first, requests.all_past = requests.second, seen[1]
    return requests
  end
  requests.total = tonumber(seen[1])
  -- At most 59: the last write left none older than that, and `last` is still in the minute.
  for second = tonumber(seen[2]), live_from - 1 do
    requests.past[#requests.past + 1] = whole(second)
  end
  if #requests.past > 0 then
    for _, count in ipairs(redis.call('HMGET', key, unpack(requests.past))) do
      requests.total = requests.total - tonumber(count or 0)
    end
  end
  return requests
end

-- When the oldest buckets have left that must leave before one more request fits.
local function retry_after(requests)
  local seconds = {}
  for second = requests.first, requests.second do
    seconds[#seconds + 1] = whole(second)
  end
  local total, last = requests.total, requests.second
  for index, count in ipairs(redis.call('HMGET', requests.key, unpack(seconds))) do
    total = total - tonumber(count or 0)
    if total < requests.limit then
      last = tonumber(seconds[index])
      break
    end
  end
  return (last + 60) * 1000 - now
end

local minutes, tightest_minute = {}, nil
for index, scope in ipairs({ 'TENANT', 'API_KEY' }) do
  local limit = tonumber(ARGV[6 + index])
  if limit > 0 then
    local requests = look(KEYS[6 + index], limit, scope)
    if requests.total >= limit then
      return { 'RATE', scope, whole(limit), whole(retry_after(requests)) }
    end
    minutes[#minutes + 1] = requests
    if not tightest_minute or limit - requests.total < tightest_minute.limit - tightest_minute.total then
      tightest_minute = requests
    end
  end
end

-- A limit and its counter, as a table; `at` is where its arguments begin.
local function limit_at(number, at)
  local unit, _, slides, rolls = string.byte(ARGV[at], 1, 4)
  local limit = {
    key = KEYS[FIRST_COUNTER + number - 1], kept_until = ARGV[at + 1], unit = string.char(unit), limit = ARGV[at + 2],
    id = ARGV[at + 3], slides = slides == YES, spent = '0', held = '0', seed = '0', new = true,
    left_dollars = 0, left_nanos = 0, room = 0,
  }
  if rolls == YES then
    read_counter(limit, ARGV[at + 4], ARGV[at + 5])
    limit.buckets, limit.width = tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6])
  else
    read_counter(limit, '')
  end
  limit.left_dollars, limit.left_nanos, limit.room = left_of(limit, limit.limit)
  return limit
end

-- What limit_at finds of money that does not roll and that one number holds, which is as good as every budget: without the
-- table it costs half. Returns what is left (nil: not such a limit) and whether its counter is new.
local function plain_left(number, at, unit, rolls)
  if unit ~= MONEY or rolls == YES then
    return nil
  end
  local read = redis.call('HMGET', KEYS[FIRST_COUNTER + number - 1], 'spent', 'held', 'seed')
  return short_left(ARGV[at + 2] + 0, read[1] or '0', read[2] or '0', read[3] or '0'),
    not read[1] and not read[2] and not read[3]
end

-- The room that every limit leaves. `limits` has a table of each that is not plain; `kept` has counters and until when.
local limits, number_of_limits, places, kept = {}, tonumber(ARGV[22]), {}, {}
local room, tightest, tightest_dollars, tightest_nanos = CALL_NANOS_MAX, nil, 0, 0
local room_tokens, tightest_tokens = nil, nil
local next_at = FIRST_LIMIT
for number = 1, number_of_limits do
  local at = next_at
  local unit, enforced, slides, rolls = string.byte(ARGV[at], 1, 4)
  places[number], next_at = at, at + (rolls == YES and ROLLING_WIDTH or LIMIT_WIDTH)
  local left, is_new = plain_left(number, at, unit, rolls)
  local left_dollars, left_nanos
  if left then
    room = math.min(room, left < 0 and -1 or left)
    left_nanos = left % NANOS_PER_USD
    left_dollars = (left - left_nanos) / NANOS_PER_USD
    if (is_new or slides == YES) and ARGV[at + 1] ~= '' then
      kept[#kept + 1], kept[#kept + 2] = KEYS[FIRST_COUNTER + number - 1], ARGV[at + 1]
    end
  else
    local limit = limit_at(number, at)
    limits[number], left_dollars, left_nanos = limit, limit.left_dollars, limit.left_nanos
    if unit == MONEY then
      room = math.min(room, limit.room)
    elseif limit.unit == TOKENS then
      limit.room = left_dollars * NANOS_PER_USD + left_nanos -- exact, also below 0
      if not tightest_tokens or limit.room < room_tokens then
        room_tokens, tightest_tokens = limit.room, limit
      end
    end
  end
  if unit == MONEY and enforced == YES
    and (not tightest or exceeds(tightest_dollars, tightest_nanos, left_dollars, left_nanos)) then
    tightest, tightest_dollars, tightest_nanos = ARGV[at + 3], left_dollars, left_nanos
  end
end

local templates = {}
for first = next_at, #ARGV, TEMPLATE_WIDTH do
  local template = {
    key = KEYS[FIRST_COUNTER + number_of_limits + #templates], counter = tonumber(ARGV[first]), subject = ARGV[first + 1],
    most = tonumber(ARGV[first + 2]), seen_since = ARGV[first + 3],
  }
  template.seen = redis.call('ZSCORE', template.key, template.subject)
  if not template.seen and redis.call('ZCOUNT', template.key, template.seen_since, '+inf') >= template.most then
    return { 'SUBJECTS', whole(template.counter) }
  end
  templates[#templates + 1] = template
end

-- How much to hold: the wanted bound, or as much of it as fits, or the smallest. Whole nanos a token round up. Below
-- 2^53 the floor of a quotient of whole numbers is exact: it cannot be rounded up to a number that it does not reach.
local input, hold_whole, hold_min = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
local token_nanos, tokens_wanted, tokens_min = tonumber(ARGV[12]), tonumber(ARGV[13]), tonumber(ARGV[14])
local share = tonumber(ARGV[15])

local function hold_of(tokens)
  if tokens == tonumber(ARGV[13]) then
    return hold_whole
  end
  if tokens == tokens_min then
    return hold_min
  end
  return math.min(hold_whole, input + tokens * token_nanos)
end

local input_tokens, choices = tonumber(ARGV[20]), tonumber(ARGV[21])
if share > 0 and tightest and token_nanos > 0 then
  local part = math.floor(math.floor(room / share) / token_nanos)
  tokens_wanted = math.min(tokens_wanted, math.max(tokens_min, UNBOUNDED_TOKENS, part))
end
local tokens = tokens_wanted
if room_tokens and choices > 0 and input_tokens + tokens * choices > room_tokens then
  tokens = math.max(math.floor((room_tokens - input_tokens) / choices), tokens_min)
end
local hold = hold_of(tokens)
if hold > room then
  local fitting_tokens = 0
  if token_nanos > 0 then
    fitting_tokens = math.floor((room - input) / token_nanos)
  end
  tokens = math.max(fitting_tokens, tokens_min)
  hold = hold_of(tokens)
end
local needs = { [CALLS] = 1, [TOKENS] = input_tokens + tokens_min * choices, [NANOS] = hold_min }
local hold_tokens = input_tokens + tokens * choices
local is_busy = limits[1] and limits[1].unit == CALLS and limits[1].room < 1
  or limits[2] and limits[2].unit == CALLS and limits[2].room < 1
if is_busy or hold > room or (room_tokens and hold_tokens > room_tokens) then
  for number = 1, number_of_limits do
    local limit = limits[number] or limit_at(number, places[number])
    if limit.room < needs[limit.unit] then
      local bucket = frees_with(limit, needs[limit.unit])
      return { 'NO_ROOM', whole(number), limit.spent, held_of(limit), bucket and whole(bucket * limit.width) or '' }
    end
  end
end

local answer = { 'RESERVED', whole(hold), whole(tokens), ARGV[18] }
if tightest_minute then
  answer[5] = whole(tightest_minute.limit)
  answer[6] = whole(tightest_minute.limit - tightest_minute.total - 1)
  answer[7] = whole(math.ceil(((tightest_minute.second + 60) * 1000 - now) / 1000))
else
  answer[5], answer[6], answer[7] = '', '', ''
end
if tightest then
  answer[8] = amount(normal(tightest_dollars, tightest_nanos - hold))
  answer[9] = tightest
else
  answer[8], answer[9] = '', ''
end
if tightest_tokens then
  answer[10], answer[11] = tightest_tokens.limit, whole(room_tokens - hold_tokens)
  answer[12] = whole(math.ceil(((tightest_tokens.last + tightest_tokens.buckets) * tightest_tokens.width - now) / 1000))
else
  answer[10], answer[11], answer[12] = '', '', ''
end

-- What a hold that must grow is held to: the limits of this moment (extend.lua).

------------------------------------------------------------------ writes
local holds = { [CALLS] = '1', [TOKENS] = whole(hold_tokens), [NANOS] = whole(hold) }
for number = 1, number_of_limits do
  local limit = limits[number]
  if not limit then
    redis.call('HINCRBY', KEYS[FIRST_COUNTER + number - 1], 'held', answer[2]) -- also of 0, so that it is there
  else
    if not limit.bucket then
      redis.call('HINCRBY', limit.key, 'held', holds[limit.unit])
    else
      move(limit, '0', tonumber(holds[limit.unit]))
    end
    if not limit.has_left then
      keep(limit, limit.kept_until, limit.slides)
    end
  end
end
for index = 1, #kept, 2 do
  redis.call('PEXPIREAT', kept[index], kept[index + 1])
end
for _, template in ipairs(templates) do
  local at = places[template.counter]
  if not template.seen then
    redis.call('ZREMRANGEBYSCORE', template.key, '-inf', '(' .. template.seen_since)
  end
  redis.call('ZADD', template.key, 'GT', ARGV[1], template.subject)
  if ARGV[at + 1] ~= '' and (not template.seen or string.byte(ARGV[at], 3) == YES) then
    redis.call('PEXPIREAT', template.key, ARGV[at + 1])
  end
end
for _, requests in ipairs(minutes) do
  if requests.all_past then
    redis.call('DEL', requests.key)
  elseif #requests.past > 0 then
    redis.call('HDEL', requests.key, unpack(requests.past))
  end
  redis.call('HINCRBY', requests.key, whole(requests.second), 1)
  redis.call('HSET', requests.key, 'total', whole(requests.total + 1), 'first', whole(requests.first), 'last',
    whole(requests.second))
  if requests.second ~= requests.last then
    redis.call('EXPIRE', requests.key, 120) -- once a second is enough
  end
end
local told = answer[2] .. PART .. answer[3] .. PART .. table.concat(answer, PART, 5)
redis.call('SET', KEYS[4],
  hold_text(answer[2], holds[TOKENS], ARGV[18], ARGV[2], ARGV[3], told, ARGV[23]))
redis.call('ZADD', KEYS[5], ARGV[17], ARGV[16])
return answer
