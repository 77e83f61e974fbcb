-- Lengthens a hold's lease; answers 0 when the operation is not held. The reference is `renew` in core/shard.py.
--
-- KEYS  1 operation  2 leases
-- ARGV  1 lease member  2 lease until (ms)

local known = read_operation(KEYS[1])
if not known or known.state ~= HELD then
  return 0
end

------------------------------------------------------------------ writes
redis.call('ZADD', KEYS[2], 'GT', ARGV[2], ARGV[1])
return 1
