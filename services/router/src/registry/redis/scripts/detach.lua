-- Records that an attachment ended, unless there is a newer one.
-- KEYS: edges. ARGV: edge, number.
local held = edge_of(ARGV[1])
if held and held.number == ARGV[2] and held.attached then
  held.attached = false
  save_edge(ARGV[1], held)
end
return 1
