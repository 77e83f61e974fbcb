-- What the scripts share. A script's text is one line that names RUN_ID, then this file, then its own.
--
-- RUN_ID is the Redis process that the text was loaded into: a constant, not an argument, so that a restarted Redis
-- cannot be asked with the old one (it has forgotten the script). It must equal the shard's epoch, which the control
-- plane alone writes, after it has checked the counters against the ledger.
--
-- Redis does not roll a script back, so each decides everything first; below the line "writes" nothing may fail.

-- A local is at hand where a global is looked up by its name each time.
local redis, string, math, table, tonumber, KEYS, ARGV = redis, string, math, table, tonumber, KEYS, ARGV

local HELD = 'HELD'
local NANOS_PER_USD = 1000000000
local CALL_NANOS_MAX = 9007199254740991 -- 2^53-1: up to here a double is exact
local COUNTER_NANOS_MAX = '9223372036854775807'

-- What a counter counts, as core/counter.py spells it.
local NANOS, TOKENS, CALLS = 'n', 't', 'c'

local function ready(epoch_key)
  return redis.call('GET', epoch_key) == RUN_ID
end

local function whole(number)
  return string.format('%d', number)
end

-- Counters are signed 64-bit, doubles are not: an amount is a pair (dollars, nanos), 0 <= nanos < 10^9.
local function normal(dollars, nanos)
  local rest = nanos % NANOS_PER_USD
  return dollars + (nanos - rest) / NANOS_PER_USD, rest
end

-- Most amounts are so short (less than a million dollars) that the sum of several of them is exact as a double.
local SHORT = 15

-- Where each microsecond counts, a text stands in arithmetic as it is (`text + 0`): it is then read once, by tonumber twice.

-- Reads an exact decimal string of nanos, as Redis keeps it; a missing one is 0.
local function money(text)
  if not text then
    return 0, 0
  end
  if #text <= SHORT then
    return normal(0, text + 0)
  end
  local nanos = tonumber(string.sub(text, -9))
  if string.byte(text) == 45 then -- a minus sign
    nanos = -nanos
  end
  return normal(tonumber(string.sub(text, 1, -10)), nanos)
end

-- Undoes `money`.
local function amount(dollars, nanos)
  local sign = ''
  if dollars < 0 then
    sign, dollars, nanos = '-', normal(-dollars, -nanos)
  end
  return sign .. (dollars > 0 and string.format('%d%09d', dollars, nanos) or whole(nanos))
end

local function exceeds(dollars, nanos, other_dollars, other_nanos)
  return dollars > other_dollars or (dollars == other_dollars and nanos > other_nanos)
end

-- As one exact number; more than one call can carry is cut to that, less than nothing to -1.
local function call_amount(dollars, nanos)
  if dollars < 0 then
    return -1
  end
  if exceeds(dollars, nanos, 9007199, 254740991) then
    return CALL_NANOS_MAX
  end
  return dollars * NANOS_PER_USD + nanos
end

-- An operation is one text, which takes a third of a hash's memory and one command to replace: a hold, later the marker of
-- its end. Its fields are apart by a byte that none has but perhaps the last; JSON would escape every quote in facts, which
-- cost more than all counters of the call together. Python reads it as operation_of in spelling.py.
local FIELD, PART = '\31', '\30'

local function split(text, separator)
  local parts, from = {}, 1
  while true do
    local at = string.find(text, separator, from, true)
    if not at then
      parts[#parts + 1] = string.sub(text, from)
      return parts
    end
    parts[#parts + 1] = string.sub(text, from, at - 1)
    from = at + 1
  end
end

-- Amounts in it are strings.
local function read_operation(key)
  local text = redis.call('GET', key)
  if not text then
    return nil
  end
  local parts = split(text, FIELD)
  local state, hold, tokens, counters = parts[1], parts[2], parts[3], parts[4]
  if state == HELD then
    return {
      state = state, hold = hold, tokens = tokens, counters = counters, facts = parts[5], asked = parts[6],
      told = parts[7], limits = table.concat(parts, FIELD, 8),
    }
  end
  return {
    state = state, hold = hold, tokens = tokens, counters = counters, amount = parts[5], sequence = parts[6],
    forgotten = parts[7],
  }
end

-- What each call writes of a hold and of a marker.
local function hold_text(hold, tokens, counters, facts, asked, told, limits)
  return table.concat({ HELD, hold, tokens, counters, facts, asked, told, limits }, FIELD)
end

local function marker_text(state, hold, tokens, counters, amount, sequence, forgotten)
  return table.concat({ state, hold, tokens, counters, amount, sequence, forgotten }, FIELD)
end

------------------------------------------------------------------ counters; the reference is core/counting.py

-- Adds to the sums of a rolling counter what its buckets from `first` to `last` have, times `sign`; returns their fields.
local function sum_buckets(counter, first, last, sign)
  local fields = {}
  for bucket = first, last do
    fields[#fields + 1], fields[#fields + 2] = 's' .. whole(bucket), 'h' .. whole(bucket)
  end
  if #fields == 0 then
    return fields
  end
  local sums = { counter.spent, counter.held }
  for index, text in ipairs(redis.call('HMGET', counter.key, unpack(fields))) do
    if text then
      local which = 2 - index % 2
      local dollars, nanos = money(sums[which])
      local more_dollars, more_nanos = money(text)
      sums[which] = amount(normal(dollars + sign * more_dollars, nanos + sign * more_nanos))
    end
  end
  counter.spent, counter.held = sums[1], sums[2]
  return fields
end

-- Reads into a table what its `key` has; of a rolling counter without what is past in `bucket` ('' when it does not
-- roll). Writes nothing. The table is the caller's, made with all that will be in it: each growth costs as a read does.
local function read_counter(counter, bucket, number)
  local read
  if bucket == '' then
    read = redis.call('HMGET', counter.key, 'spent', 'held', 'seed')
  else
    read = redis.call('HMGET', counter.key, 'spent', 'held', 'seed', 'first', 'last')
  end
  counter.spent, counter.held, counter.seed = read[1] or '0', read[2] or '0', read[3] or '0'
  counter.new = not read[1] and not read[2] and not read[3]
  if bucket == '' then
    return counter
  end
  bucket, number, counter.past = tonumber(bucket), tonumber(number), {}
  counter.bucket, counter.first, counter.last = bucket, bucket, bucket
  local last = tonumber(read[5])
  if not last then
    return counter
  end
  counter.last = math.max(bucket, last)
  counter.live_from = counter.last - number + 1
  if last < counter.live_from then
    counter.all_past, counter.spent, counter.held = true, '0', '0'
    return counter
  end
  counter.first = math.min(math.max(tonumber(read[4]), counter.live_from), bucket)
  counter.has_left = bucket < counter.live_from
  -- At most `number`: the last write left none older than that.
  counter.past = sum_buckets(counter, tonumber(read[4]), counter.live_from - 1, -1)
  return counter
end

-- What a limit leaves, as one exact number; nil when one may not hold it. A sum below zero is damage, not credit.
local function short_left(most, spent, held, seed)
  if most > CALL_NANOS_MAX or #spent > SHORT or #held > SHORT or #seed > SHORT then
    return nil
  end
  local spent_nanos, held_nanos, seed_nanos = spent + 0, held + 0, seed ~= '0' and seed + 0 or 0
  return most - (spent_nanos > 0 and spent_nanos or 0) - (held_nanos > 0 and held_nanos or 0)
    - (seed_nanos > 0 and seed_nanos or 0)
end

-- The same as a pair, and as call_amount says it.
local function left_of(counter, limit)
  local spent, held, seed = counter.spent, counter.held, counter.seed
  local left = short_left(limit + 0, spent, held, seed) -- as good as always; it takes half the time
  if left then
    local left_nanos = left % NANOS_PER_USD
    return (left - left_nanos) / NANOS_PER_USD, left_nanos, left < 0 and -1 or left
  end
  local left_dollars, left_nanos = money(limit)
  local spent_dollars, spent_nanos = money(spent)
  local held_dollars, held_nanos = money(held)
  local seed_dollars, seed_nanos = money(seed)
  if spent_dollars < 0 then
    spent_dollars, spent_nanos = 0, 0
  end
  if held_dollars < 0 then
    held_dollars, held_nanos = 0, 0
  end
  if seed_dollars < 0 then
    seed_dollars, seed_nanos = 0, 0
  end
  left_dollars, left_nanos = normal(
    left_dollars - spent_dollars - held_dollars - seed_dollars, left_nanos - spent_nanos - held_nanos - seed_nanos
  )
  return left_dollars, left_nanos, call_amount(left_dollars, left_nanos)
end

-- What is held in all, as a text.
local function held_of(counter)
  local dollars, nanos = money(counter.held)
  local seed_dollars, seed_nanos = money(counter.seed)
  return amount(normal(dollars + seed_dollars, nanos + seed_nanos))
end

-- The bucket with which a rolling counter has room for `needed`, if nothing else comes; nil for one that does not roll. Of
-- the counter, what its limit leaves and the number of its buckets are known.
local function frees_with(counter, needed)
  if not counter.bucket then
    return nil
  end
  local fields = {}
  for bucket = counter.first, counter.last do
    fields[#fields + 1], fields[#fields + 2] = 's' .. whole(bucket), 'h' .. whole(bucket)
  end
  local needed_dollars, needed_nanos = normal(0, needed)
  local left_dollars, left_nanos = counter.left_dollars, counter.left_nanos
  local leaving = counter.last
  for index, text in ipairs(redis.call('HMGET', counter.key, unpack(fields))) do
    local dollars, nanos = money(text)
    left_dollars, left_nanos = normal(left_dollars + dollars, left_nanos + nanos)
    if index % 2 == 0 and not exceeds(needed_dollars, needed_nanos, left_dollars, left_nanos) then
      leaving = counter.first + index / 2 - 1
      break
    end
  end
  return leaving + counter.buckets
end

-- How much fits of what is to be added: a counter that would overflow stays at its end, where nothing more is admitted.
-- Returns it, and what is spent then.
local function fitting(spent, more)
  if #spent <= SHORT and #more <= SHORT then
    return more, whole(spent + more)
  end
  local more_dollars, more_nanos = money(more)
  local dollars, nanos = money(spent)
  local max_dollars, max_nanos = money(COUNTER_NANOS_MAX)
  local sum_dollars, sum_nanos = normal(dollars + more_dollars, nanos + more_nanos)
  if exceeds(sum_dollars, sum_nanos, max_dollars, max_nanos) then
    return amount(normal(max_dollars - dollars, max_nanos - nanos)), COUNTER_NANOS_MAX
  end
  return more, amount(sum_dollars, sum_nanos)
end

-- Drops what `read_counter` found to be past, and writes the sums.
local function write_rolling(counter)
  if counter.all_past then
    redis.call('DEL', counter.key)
    if counter.seed ~= '0' then
      redis.call('HSET', counter.key, 'seed', counter.seed)
    end
  elseif #counter.past > 0 then
    redis.call('HDEL', counter.key, unpack(counter.past))
  end
  counter.all_past, counter.past = false, {}
  redis.call('HSET', counter.key, 'spent', counter.spent, 'held', counter.held,
    'first', whole(counter.first), 'last', whole(counter.last))
end

-- A write: adds to what is spent (a text) and held (a number) in the counter and, if it rolls, in the bucket that it was
-- read for.
local function move(counter, spent, held)
  if counter.has_left then
    return
  end
  local fits
  fits, counter.spent = fitting(counter.spent, spent)
  if held ~= 0 or counter.bucket then
    local dollars, nanos = money(counter.held)
    local more_dollars, more_nanos = normal(0, held) -- apart: a call's most and some nanos are no exact double
    counter.held = amount(normal(dollars + more_dollars, nanos + more_nanos))
  end
  if not counter.bucket then
    if held == 0 then
      redis.call('HSET', counter.key, 'spent', counter.spent)
    else
      redis.call('HSET', counter.key, 'spent', counter.spent, 'held', counter.held)
    end
    return
  end
  write_rolling(counter)
  redis.call('HINCRBY', counter.key, 's' .. whole(counter.bucket), fits)
  redis.call('HINCRBY', counter.key, 'h' .. whole(counter.bucket), whole(held))
end

-- A write: sets until when a counter is kept ('' for ever), when it is new, or each time if it `slides`.
local function keep(counter, kept_until, slides)
  if kept_until ~= '' and (counter.new or slides) then
    redis.call('PEXPIREAT', counter.key, kept_until)
  end
end

-- Reads the counters of KEYS from `first` on. Of each, ARGV has from `argument` on what its name says: kept until (ms, or
-- ''), unit, bucket and number of buckets ('' when it does not roll).
local COUNTER_WIDTH = 4
local function read_counters(first, argument)
  local counters = {}
  for index = first, #KEYS do
    local at = argument + (index - first) * COUNTER_WIDTH
    local counter = {
      key = KEYS[index], kept_until = ARGV[at], unit = ARGV[at + 1], buckets = tonumber(ARGV[at + 3]),
      spent = '0', held = '0', seed = '0', new = true,
    }
    counters[#counters + 1] = read_counter(counter, ARGV[at + 2], ARGV[at + 3])
  end
  return counters
end

-- A write: moves an operation's money in its counters. What it held, if it did, is free, and this much more is spent.
local function free(operation, counters, held, nanos, tokens)
  local holds = { [NANOS] = tonumber(operation.hold), [TOKENS] = tonumber(operation.tokens), [CALLS] = 1 }
  local spends = { [NANOS] = nanos, [TOKENS] = tokens, [CALLS] = 0 }
  for _, counter in ipairs(counters) do
    local freed = held and holds[counter.unit] or 0
    if freed ~= 0 or spends[counter.unit] ~= 0 then
      move(counter, whole(spends[counter.unit]), 0 - freed) -- a negation would make "-0" of 0
      keep(counter, counter.kept_until, false)
    end
  end
end

-- Ends an operation: moves its money, remembers the end and tells the ledger.
--   keys           operation, leases, usage; member
--   operation      how it stood: hold and tokens (strings), amount and charged (numbers, so far), held or not
--   ending         state, amount and tokens (numbers), sequence, hold, facts, usage, ended_at, status, detail, tier,
--                  forgotten
--   counters       what read_counters returned
local function end_operation(keys, operation, ending, counters, counter_names, marker_kept_ms)
  local delta = ending.amount - operation.amount

  ---------------------------------------------------------------- writes
  free(operation, counters, operation.held, delta, ending.tokens - operation.charged)
  -- The marker keeps what a later end needs: what stands, and where it was counted.
  local amount_text = whole(ending.amount)
  redis.call('SET', keys.operation,
    marker_text(
      ending.state, ending.hold, whole(ending.tokens), counter_names, amount_text, ending.sequence, ending.forgotten
    ),
    'PX', marker_kept_ms)
  redis.call('ZREM', keys.leases, keys.member)
  redis.call('XADD', keys.usage, '*', 'facts', ending.facts, 'end', ending.state, 'sequence', ending.sequence,
    'delta', whole(delta), 'amount', amount_text, 'hold', ending.hold, 'usage', ending.usage,
    'ended_at', ending.ended_at, 'status', ending.status, 'detail', ending.detail, 'tier', ending.tier,
    'counters', counter_names, 'forgotten', ending.forgotten)
end

-- The id of the last event that a stream was ever given, also of a trimmed one.
local function newest_event(stream_key)
  local stream = redis.call('EXISTS', stream_key) == 1 and redis.call('XINFO', 'STREAM', stream_key) or {}
  for index = 1, #stream, 2 do
    if stream[index] == 'last-generated-id' then
      return stream[index + 1]
    end
  end
  return '0-0'
end
