-- Ends a hold whose lease has run out, at its full amount: expiry never frees money, or a late settle could pass the
-- limit. The reference is `expire` in core/shard.py.
--
-- KEYS  1 epoch  2 operation  3 leases  4 usage stream  5... the operation's counters
-- ARGV  1 now (ms)  2 lease member  3 how long a marker is kept (ms)  4 counter names  5 service tier  6 detail
--       7... for each counter what read_counters takes

if not ready(KEYS[1]) then
  return 0
end

-- Between the caller's look and now the lease may have been renewed, or the operation ended.
local lease_until = redis.call('ZSCORE', KEYS[3], ARGV[2])
if not lease_until or tonumber(lease_until) > tonumber(ARGV[1]) then
  return 0
end
local known = read_operation(KEYS[2])
if not known or known.state ~= HELD or known.counters ~= ARGV[4] then
  return 0
end

local hold, tokens = tonumber(known.hold), tonumber(known.tokens)
end_operation(
  { operation = KEYS[2], leases = KEYS[3], usage = KEYS[4], member = ARGV[2] },
  { hold = known.hold, tokens = known.tokens, amount = 0, charged = 0, held = true },
  {
    state = 'EXPIRED', amount = hold, tokens = tokens, sequence = '1', hold = known.hold, facts = known.facts,
    usage = '', ended_at = ARGV[1], status = '0', detail = ARGV[6], tier = ARGV[5], forgotten = '0',
  },
  read_counters(5, 7), known.counters, ARGV[3]
)
return 1
