-- Removes sessions.
-- KEYS: edges, the edge's sessions, and the sessions of each one's user.
-- ARGV: edge, number of the attachment; then session and user for each.
-- Answers, for each, 1 or the other user that has it; nothing at all when the attachment ended.
local name = ARGV[1]
local held = edge_of(name)
if not held or held.number ~= ARGV[2] or not held.attached then
  return {}
end
local answers = {}
for at = 1, #KEYS - 2 do
  local session, user = ARGV[at * 2 + 1], ARGV[at * 2 + 2]
  local known = redis.call('HGET', KEYS[2], session)
  local holder = known and string.match(known, '^%d+ (.*)$')
  answers[at] = 1
  if holder == user then
    redis.call('HDEL', KEYS[2], session)
    redis.call('HDEL', KEYS[2 + at], session .. name)
  elseif holder then
    answers[at] = holder
  end
end
return answers
