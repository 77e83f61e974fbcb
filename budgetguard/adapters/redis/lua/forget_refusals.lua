-- Drops what Postgres has of a shard's refusals: entries of the stream, and each count unless it has risen meanwhile. The
-- reference is `forget_refusals` in core/attempt_counts.py.
--
-- KEYS  1 stream  2 counts
-- ARGV  1 number of entries  2... their ids, then names and values of counts in turn

local counts_from = 2 + tonumber(ARGV[1])

------------------------------------------------------------------ writes
for index = 2, counts_from - 1 do
  redis.call('XDEL', KEYS[1], ARGV[index])
end
for index = counts_from, #ARGV, 2 do
  if redis.call('HGET', KEYS[2], ARGV[index]) == ARGV[index + 1] then
    redis.call('HDEL', KEYS[2], ARGV[index])
  end
end
return 1
