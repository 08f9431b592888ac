-- Removes sessions that were set aside.
-- KEYS: what was set aside, the sessions set aside, and the sessions of each one's user.
-- ARGV: number under which they were set aside, edge; then session and its record, for each.
local name = ARGV[2]
for at = 1, #KEYS - 2 do
  local session, seen = ARGV[at * 2 + 1], ARGV[at * 2 + 2]
  local field = session .. name
  local record = redis.call('HGET', KEYS[2 + at], field)
  redis.call('HDEL', KEYS[2], session)
  -- The next incarnation may have announced the same session.
  if record and tonumber(string.match(record, '^%d+')) <= tonumber(string.match(seen, '^%d+')) then
    redis.call('HDEL', KEYS[2 + at], field)
  end
end
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('HDEL', KEYS[1], ARGV[1])
end
return 1
