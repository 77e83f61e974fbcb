-- Drops the events that every group has acknowledged, and nothing else; answers how many went. One step, because a
-- reader may take new events between a look at what is pending and a look at what was delivered.
--
-- KEYS  1 usage stream

local oldest_needed -- as {milliseconds, sequence}

local function need(id, after)
  local milliseconds, sequence = string.match(id, '^(%d+)-(%d+)$')
  local needed = { tonumber(milliseconds), tonumber(sequence) + after }
  if not oldest_needed or needed[1] < oldest_needed[1]
    or (needed[1] == oldest_needed[1] and needed[2] < oldest_needed[2]) then
    oldest_needed = needed
  end
end

if redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local fields = {}
  for index = 1, #group, 2 do
    fields[group[index]] = group[index + 1]
  end
  if fields['pending'] > 0 then
    need(redis.call('XPENDING', KEYS[1], fields['name'])[2], 0)
  else
    need(fields['last-delivered-id'], 1)
  end
end
if not oldest_needed then
  return 0 -- nobody reads it yet, so nothing is acknowledged
end

------------------------------------------------------------------ writes
return redis.call('XTRIM', KEYS[1], 'MINID', '=', whole(oldest_needed[1]) .. '-' .. whole(oldest_needed[2]))
