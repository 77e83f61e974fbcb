-- Opens a shard whose counters are right. Answers LOST when that is not known: since the opening began, Redis was restarted,
-- was emptied, or the shard was closed once more. Answers BEHIND when its stream ends before what the ledger has, unless its
-- counters were rebuilt from there: then the stream goes on after that. The reference is `sign_off` in core/shard.py.
--
-- KEYS  1 epoch  2 generation  3 usage stream
-- ARGV  1 opening  2 run id that it began with  3 new generation  4 newest event that the ledger has: ms  5 and sequence
--       6 '1' when the shard was rebuilt  7 the ledger's consumer group

if redis.call('GET', KEYS[1]) ~= ARGV[1] or ARGV[2] ~= RUN_ID then
  return 'LOST'
end
local ms, sequence = tonumber(ARGV[4]), tonumber(ARGV[5])
local newest_ms, newest_sequence = string.match(newest_event(KEYS[3]), '(%d+)-(%d+)')
local is_behind = newest_ms + 0 < ms or (newest_ms + 0 == ms and newest_sequence + 0 < sequence)
if is_behind and ARGV[6] ~= '1' then
  return 'BEHIND'
end

------------------------------------------------------------------ writes
if is_behind then
  local position = ARGV[4] .. '-' .. ARGV[5]
  redis.pcall('XGROUP', 'CREATE', KEYS[3], ARGV[7], '0', 'MKSTREAM') -- it may be there
  redis.call('XSETID', KEYS[3], position)
  redis.call('XGROUP', 'SETID', KEYS[3], ARGV[7], position)
end
redis.call('MSET', KEYS[1], RUN_ID, KEYS[2], ARGV[3])
return 'OPENED'
