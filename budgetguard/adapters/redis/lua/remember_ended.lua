-- Writes the marker of an operation whose end the ledger has, while the shard is being rebuilt: a settle that is sent
-- again then charges nothing, and a hold that a rolled-back Redis has revived is dropped. Spent is not touched: the
-- rebuild writes it whole. Answers 0 when the shard is in use. The reference is `remember_ended` in core/shard.py.
--
-- KEYS  1 epoch  2 operation  3 leases  4... the counters of the operation
-- ARGV  1 end  2 amount (nanos)  3 hold (nanos)  4 sequence  5 counter names  6 lease member
--       7 how long a marker is kept (ms)  8 tokens used  9... for each counter what read_counters takes

if ready(KEYS[1]) then
  return { 'READY' }
end

local known = read_operation(KEYS[2])
local is_held = known and known.state == HELD
if is_held and known.counters ~= ARGV[5] then
  return { 'COUNTERS', known.counters } -- the caller asks again, with these keys
end
local counters = read_counters(4, 9)

------------------------------------------------------------------ writes
if is_held then
  free(known, counters, true, 0, 0)
end
redis.call('SET', KEYS[2], marker_text(ARGV[1], ARGV[3], ARGV[8], ARGV[5], ARGV[2], ARGV[4], '0'), 'PX', ARGV[7])
redis.call('ZREM', KEYS[3], ARGV[6])
return { 'REMEMBERED' }
