-- Takes what a process tells of refused attempts: the count of one counter (a tenant's key, reason and minute, told by one
-- source) and attempts to keep. The first ten of a minute, key and reason become entries of the stream, whoever tells
-- them; the count always has all. Told again, nothing changes. Answers 0 when there is no room for another counter.
-- Refusals are not money: no epoch is needed. The reference is `refuse` in core/attempt_counts.py.
--
-- KEYS  1 numbers of the tenant's minute  2 counts on their way to Postgres  3 stream
-- ARGV  1 key and reason  2 source  3 name of the count  4 count  5 number of the first attempt, among the source's
--       6 how many rows a minute  7 how long numbers are kept (ms)  8 rows that may wait  9 counts that may wait
--       10... attempts (JSON)

local of_source = ARGV[1] .. ' ' .. ARGV[2]
local numbers = redis.call('HMGET', KEYS[1], ARGV[1], of_source)
local row, seen = tonumber(numbers[1] or 0), tonumber(numbers[2] or 0)
local counted = redis.call('HGET', KEYS[2], ARGV[3])
if not counted and redis.call('HLEN', KEYS[2]) >= tonumber(ARGV[9]) then
  return 0
end

local first = tonumber(ARGV[5])
local last = first + #ARGV - 10
local rows_left = math.min(tonumber(ARGV[6]) - row, tonumber(ARGV[8]) - redis.call('XLEN', KEYS[3]))

------------------------------------------------------------------ writes
if not counted or tonumber(ARGV[4]) > tonumber(counted) then
  redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
end
if last >= first and last > seen then
  for number = math.max(first, seen + 1), last do
    if rows_left > 0 then
      row, rows_left = row + 1, rows_left - 1
      redis.call('XADD', KEYS[3], '*', 'attempt', ARGV[10 + number - first], 'number', whole(row))
    end
  end
  redis.call('HSET', KEYS[1], ARGV[1], whole(row), of_source, whole(last))
  redis.call('PEXPIRE', KEYS[1], ARGV[7])
end
return 1
