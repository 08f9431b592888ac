-- Records sessions.
-- KEYS: edges, the edge's sessions, the number of sessions ever opened, and the sessions of each one's user.
-- ARGV: edge, number of the attachment; then session, user and inbox for each.
-- Answers, for each, 1 or the other user that has it; nothing at all when the attachment ended.
local name, number = ARGV[1], ARGV[2]
local held = edge_of(name)
if not held or held.number ~= number or not held.attached then
  return {}
end
local count = #KEYS - 3
local opened = redis.call('INCRBY', KEYS[3], count) - count
local answers = {}
for at = 1, count do
  local session, user, inbox = ARGV[at * 3], ARGV[at * 3 + 1], ARGV[at * 3 + 2]
  local known = redis.call('HGET', KEYS[2], session)
  local holder = known and string.match(known, '^%d+ (.*)$')
  if holder and holder ~= user then
    answers[at] = holder
  else
    local field, place = session .. name, string.format('%.0f', opened + at)
    local record = holder and redis.call('HGET', KEYS[3 + at], field)
    if record then
      place = string.match(record, '^%d+ (%d+) ')
    end
    redis.call('HSET', KEYS[2], session, number .. ' ' .. user)
    redis.call('HSET', KEYS[3 + at], field, number .. ' ' .. place .. ' ' .. inbox)
    answers[at] = 1
  end
end
return answers
