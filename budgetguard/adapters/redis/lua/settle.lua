-- Ends an operation by rank: settles or releases it. The reference is `settle` in core/shard.py.
--
-- An operation that is not known is charged all the same, or only told to the ledger when it may have been counted and
-- forgotten; the marker it leaves refuses a reserve of the same id that was still on its way.
--
-- KEYS  1 epoch  2 operation  3 leases  4 usage stream  5... the operation's counters
-- ARGV  1 now (ms)  2 end  3 amount (nanos)  4 hold (nanos)  5 counter names  6 facts (JSON)  7 usage (JSON or '')
--       8 ended at (ms)  9 status  10 detail  11 service tier  12 held at (ms)  13 lease member
--       14 how long a marker is kept (ms)  15 how old an unknown operation may be to be charged (ms)
--       16 the ends that this one replaces, each between spaces  17 the sequence that a correction was decided upon (0: none)
--       18 tokens used ('': nobody said, so that what was held stands)  19 tokens that the hold paid for
--       20... for each counter what read_counters takes

if not ready(KEYS[1]) then
  return { 'NOT_READY' }
end

local known = read_operation(KEYS[2]) or {}
local state, counter_names = known.state, ARGV[5]
local charged = tonumber(ARGV[1]) - tonumber(ARGV[12]) < tonumber(ARGV[15])
if state or not charged then
  -- What was counted when the call was admitted counts, whatever the caller believes.
  local counted = known.counters or ''
  if counted ~= counter_names then
    return { 'COUNTERS', counted } -- the caller asks again, with these keys
  end
end

if state and state ~= HELD then
  local replaces = string.find(ARGV[16], ' ' .. state .. ' ', 1, true)
  if ARGV[17] ~= '0' then
    replaces = ARGV[17] == known.sequence -- decided upon that row, so it replaces no other
  end
  if not replaces then
    return { 'ENDED', state, known.amount, known.sequence }
  end
end

local operation = { hold = known.hold or ARGV[4], tokens = known.tokens or ARGV[19], amount = 0, charged = 0 }
local sequence = tonumber(ARGV[17]) + 1
if state == HELD then
  operation.held = true
elseif state then
  operation.amount, operation.charged = tonumber(known.amount), tonumber(known.tokens)
  sequence = tonumber(known.sequence) + 1
end

end_operation(
  { operation = KEYS[2], leases = KEYS[3], usage = KEYS[4], member = ARGV[13] },
  operation,
  {
    state = ARGV[2], amount = tonumber(ARGV[3]), tokens = tonumber(ARGV[18] ~= '' and ARGV[18] or operation.tokens),
    sequence = whole(sequence), hold = operation.hold, facts = known.facts or ARGV[6], usage = ARGV[7],
    ended_at = ARGV[8], status = ARGV[9], detail = ARGV[10], tier = ARGV[11],
    forgotten = state and (known.forgotten or '0') or '1',
  },
  read_counters(5, 20), counter_names, ARGV[14]
)
return { 'ENDED', ARGV[2], ARGV[3], whole(sequence) }
