-- Reads counters together with how far the events of their shard have come: what is spent in them is the sum of the
-- events up to that one. Answers the generation ('' while the shard is not ready), the newest event's id, and each
-- counter's fields.
--
-- KEYS  1 epoch  2 usage stream  3 generation  4... counters

local newest = '0-0'
if redis.call('EXISTS', KEYS[2]) == 1 then
  local stream = redis.call('XINFO', 'STREAM', KEYS[2])
  for index = 1, #stream, 2 do
    if stream[index] == 'last-generated-id' then
      newest = stream[index + 1]
    end
  end
end
local answer = { ready(KEYS[1]) and redis.call('GET', KEYS[3]) or '', newest }
for index = 4, #KEYS do
  answer[index - 1] = redis.call('HGETALL', KEYS[index])
end
return answer
