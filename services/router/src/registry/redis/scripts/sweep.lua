-- Removes sessions that nobody vouches for: of an attachment that ended all, else those not announced on it.
-- KEYS: edges, the edge's sessions, and the sessions of each one's user.
-- ARGV: edge, number of its latest attachment; then session and its record as it was seen, for each.
-- Answers how many were removed, or -1 when there is a newer attachment.
local name, number = ARGV[1], ARGV[2]
local held = edge_of(name)
if not held or held.number ~= number then
  return -1
end
local removed = 0
for at = 1, #KEYS - 2 do
  local session, seen = ARGV[at * 2 + 1], ARGV[at * 2 + 2]
  local announced = string.match(seen, '^%d+')
  local stale = not held.attached or announced ~= number
  if stale and redis.call('HGET', KEYS[2], session) == seen then
    redis.call('HDEL', KEYS[2], session)
    redis.call('HDEL', KEYS[2 + at], session .. name)
    removed = removed + 1
  end
end
if not held.attached and redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('HDEL', KEYS[1], name)
end
return removed
