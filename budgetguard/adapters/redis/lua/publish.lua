-- Stores a record if it is newer than the one there; answers 1 when it was. Deleted is a record too: a tombstone with a
-- version of its own. The reference is `publish` in core/shard.py.
--
-- KEYS  1 record
-- ARGV  1 version  2 record

local stored = redis.call('HGET', KEYS[1], 'version')
if stored and tonumber(stored) >= tonumber(ARGV[1]) then
  return 0
end

------------------------------------------------------------------ writes
redis.call('HSET', KEYS[1], 'version', ARGV[1], 'record', ARGV[2])
return 1
