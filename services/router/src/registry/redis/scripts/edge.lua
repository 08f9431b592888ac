-- What the scripts about edges begin with. KEYS[1] has the attachments of all edges.

-- The attachment of an edge, or nil. Numbers stay text: an incarnation has more bits than a number of Lua.
local function edge_of(name)
  local text = redis.call('HGET', KEYS[1], name)
  if not text then
    return nil
  end
  local incarnation, number, since, attached, beat, router =
    string.match(text, '^(%d+) (%d+) (%d+) ([01]) (%d+) (.*)$')
  return {
    incarnation = incarnation,
    number = number,
    since = since,
    attached = attached == '1',
    beat = tonumber(beat),
    router = router,
  }
end

local function save_edge(name, edge)
  local attached = edge.attached and '1' or '0'
  local beat = string.format('%.0f', edge.beat)
  local text = table.concat({edge.incarnation, edge.number, edge.since, attached, beat, edge.router}, ' ')
  redis.call('HSET', KEYS[1], name, text)
end

