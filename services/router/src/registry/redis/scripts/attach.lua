-- Records an attachment; sets the sessions of another incarnation aside.
-- KEYS: edges, the edge's sessions, what was set aside, the edge's sessions when they are set aside.
-- ARGV: edge, incarnation, number, router.
-- Answers 1, or 0 when there is a newer attachment.
local name, number = ARGV[1], ARGV[3]
local held = edge_of(name)
if held and tonumber(held.number) > tonumber(number) then
  return 0
end
local since = number
if held and held.incarnation == ARGV[2] then
  since = held.since
elseif redis.call('EXISTS', KEYS[2]) == 1 then
  redis.call('RENAME', KEYS[2], KEYS[4])
  redis.call('HSET', KEYS[3], number, name)
end
save_edge(name, {
  incarnation = ARGV[2], number = number, since = since, attached = true, beat = 0, router = ARGV[4],
})
return 1
