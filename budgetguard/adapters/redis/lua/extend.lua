-- Raises a hold in each of its counters, or in none: a stream that tops up. The limits are those of its admission, which
-- it keeps. The whole hold is named, so asking twice raises it once. The reference is `extend` in core/shard.py.
--
-- KEYS  1 epoch  2 operation  3... the operation's counters
-- ARGV  1 the hold that is wanted  2 counter names  3 '1' when it is held whatever the limits say
--       4 the tokens that it pays for  5... for each counter what read_counters takes

if not ready(KEYS[1]) then
  return { 'NOT_READY' }
end

local known = read_operation(KEYS[2])
if not known or known.state ~= HELD then
  return { 'NO_HOLD' }
end
if known.counters ~= ARGV[2] then
  return { 'COUNTERS', known.counters } -- the caller asks again, with these keys
end

local more = tonumber(ARGV[1]) - tonumber(known.hold)
if more <= 0 then
  return { 'EXTENDED', known.hold }
end

local limits = {}
for line in string.gmatch(known.limits, '[^\n]+') do
  local limit, whose = string.match(line, '^(%d+) (.*)$')
  -- Forced, only the counter itself has an end.
  limits[#limits + 1] = { nanos = ARGV[3] == '1' and COUNTER_NANOS_MAX or limit, whose = whose }
end

-- The room that every budget leaves, as in reserve.lua. A limit of tokens paces what is admitted: it ends no stream.
local counters, room, short = read_counters(3, 5), CALL_NANOS_MAX, nil
for position, counter in ipairs(counters) do
  if counter.unit == NANOS and not counter.has_left then
    local left
    counter.left_dollars, counter.left_nanos, left = left_of(counter, limits[position].nanos)
    room = math.min(room, left)
    if more > left and not short then
      short = position
    end
  end
end
if short then
  local limit, counter = limits[short], counters[short]
  local bucket = frees_with(counter, more)
  return {
    'BUDGET', whole(short), limit.whose, limit.nanos, counter.spent, held_of(counter), whole(more), whole(room),
    bucket and whole(bucket) or '',
  }
end
local grows = { [NANOS] = more, [TOKENS] = math.max(tonumber(ARGV[4]) - tonumber(known.tokens), 0), [CALLS] = 0 }

------------------------------------------------------------------ writes
for _, counter in ipairs(counters) do
  if grows[counter.unit] > 0 then
    move(counter, '0', grows[counter.unit])
    keep(counter, counter.kept_until, false)
  end
end
local tokens = whole(tonumber(known.tokens) + grows[TOKENS])
redis.call('SET', KEYS[2],
  hold_text(ARGV[1], tokens, known.counters, known.facts, known.asked, known.told, known.limits))
return { 'EXTENDED', ARGV[1] }
