-- Reads counters together with how far the events of their shard have come: what is spent in them is the sum of the
-- events up to that one. Answers the generation ('' while the shard is not ready), the newest event's id, and each
-- counter's fields.
--
-- KEYS  1 epoch  2 usage stream  3 generation  4... counters

local answer = { ready(KEYS[1]) and redis.call('GET', KEYS[3]) or '', newest_event(KEYS[2]) }
for index = 4, #KEYS do
  answer[index - 1] = redis.call('HGETALL', KEYS[index])
end
return answer
