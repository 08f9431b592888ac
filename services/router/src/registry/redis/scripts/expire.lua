-- Ends an attachment that nobody renewed since it was looked at.
-- KEYS: edges. ARGV: edge, its attachment as it was seen.
-- Answers whether it is as it was.
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
local held = edge_of(ARGV[1])
held.attached = false
save_edge(ARGV[1], held)
return 1
