-- Sets what a counter has spent, while the shard is being rebuilt and nobody else writes it; what it holds stays. Answers
-- 0 when the shard is not in this opening. The reference is `write_counter` in core/shard.py.
--
-- KEYS  1 epoch  2 counter
-- ARGV  1 opening  2 kept until (ms, or '')  3 bucket  4 number of buckets ('' when it does not roll)
--       5... spent (nanos), or of a rolling one pairs: bucket, spent in it

if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
local counter = read_counter({ key = KEYS[2] }, ARGV[3], ARGV[4])

------------------------------------------------------------------ writes
if counter.bucket then
  write_rolling(counter)
  local live_from, places, dollars, nanos = counter.last - tonumber(ARGV[4]) + 1, { counter.last }, 0, 0
  for _, field in ipairs(redis.call('HKEYS', KEYS[2])) do
    local bucket = string.match(field, '^[sh](%d+)$')
    if bucket then
      redis.call('HSET', KEYS[2], 's' .. bucket, '0')
      places[#places + 1] = tonumber(bucket)
    end
  end
  for index = 5, #ARGV, 2 do
    local bucket, more_dollars, more_nanos = tonumber(ARGV[index]), money(ARGV[index + 1])
    if bucket >= live_from then
      redis.call('HSET', KEYS[2], 's' .. ARGV[index], ARGV[index + 1])
      dollars, nanos = normal(dollars + more_dollars, nanos + more_nanos)
      places[#places + 1] = bucket
    end
  end
  table.sort(places)
  redis.call('HSET', KEYS[2], 'spent', amount(dollars, nanos), 'first', whole(places[1]), 'last', whole(places[#places]))
else
  redis.call('HSET', KEYS[2], 'spent', ARGV[5])
end
if ARGV[2] ~= '' then
  redis.call('PEXPIREAT', KEYS[2], ARGV[2])
end
return 1
