-- Says that attachments last.
-- KEYS: edges. ARGV: edge and number, for each.
-- Answers 1 for each that lasts, and 0 for each that ended.
local answers = {}
for at = 1, #ARGV, 2 do
  local held = edge_of(ARGV[at])
  if held and held.number == ARGV[at + 1] and held.attached then
    held.beat = held.beat + 1
    save_edge(ARGV[at], held)
    answers[#answers + 1] = 1
  else
    answers[#answers + 1] = 0
  end
end
return answers
