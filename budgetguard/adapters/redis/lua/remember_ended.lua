-- Writes the marker of an operation whose end the ledger has, while the shard is being rebuilt: a settle that is sent
-- again then charges nothing, and a hold that a rolled-back Redis has revived is dropped. Spent is not touched: the
-- rebuild writes it whole. Answers LOST when the shard is not in this opening. The reference is `remember_ended` in core/shard.py.
--
-- KEYS  1 epoch  2 operation  3 leases  4... the counters of the operation
-- ARGV  1 opening  2 end  3 amount (nanos)  4 hold (nanos)  5 sequence  6 counter names  7 lease member
--       8 how long a marker is kept (ms)  9 tokens used  10... for each counter what read_counters takes

if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return { 'LOST' }
end

local known = read_operation(KEYS[2])
local is_held = known and known.state == HELD
if is_held and known.counters ~= ARGV[6] then
  return { 'COUNTERS', known.counters } -- the caller asks again, with these keys
end
local counters = read_counters(4, 10)

------------------------------------------------------------------ writes
if is_held then
  free(known, counters, true, 0, 0)
end
redis.call('SET', KEYS[2], marker_text(ARGV[2], ARGV[4], ARGV[9], ARGV[6], ARGV[3], ARGV[5], '0'), 'PX', ARGV[8])
redis.call('ZREM', KEYS[3], ARGV[7])
return { 'REMEMBERED' }
