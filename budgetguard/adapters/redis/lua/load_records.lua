-- Reads a caller's records together with whether they are what they should be: none may be missed, and none be believed,
-- before the shard is signed off. A tenant's record is read for a known key only.
--
-- KEYS  1 epoch  2 tenant record  3 API key record

if not ready(KEYS[1]) then
  return { 'NOT_READY' }
end
local key = redis.call('HGET', KEYS[3], 'record')
return { 'RECORDS', key and redis.call('HGET', KEYS[2], 'record'), key }
