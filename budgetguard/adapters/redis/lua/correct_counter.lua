-- Adds to a counter what the ledger has and it has not, and says what is held by calls that were admitted before it was
-- there. Answers 0 when the shard is not ready, or was signed off anew since it was read. The reference is
-- `correct_counter` in core/shard.py.
--
-- KEYS  1 epoch  2 counter  3 generation
-- ARGV  1 generation it was read in  2 seed (nanos)  3 kept until (ms, or '')  4 '1' when it is kept longer with each use
--       5 bucket  6 number of buckets ('' when it does not roll)  7... pairs: bucket (or ''), what to add (nanos)

if not ready(KEYS[1]) or redis.call('GET', KEYS[3]) ~= ARGV[1] then
  return 0
end
local counter = read_counter({ key = KEYS[2] }, ARGV[5], ARGV[6])

------------------------------------------------------------------ writes
if counter.bucket then
  write_rolling(counter)
end
for index = 7, #ARGV, 2 do
  local bucket, delta = tonumber(ARGV[index]), ARGV[index + 1]
  if delta ~= '0' then
    if bucket then
      counter.bucket, counter.has_left = bucket, bucket < counter.last - tonumber(ARGV[6]) + 1
      counter.first = counter.has_left and counter.first or math.min(counter.first, bucket)
    end
    move(counter, delta, 0)
  end
end
redis.call('HSET', KEYS[2], 'seed', ARGV[2])
keep(counter, ARGV[3], ARGV[4] == '1')
return 1
