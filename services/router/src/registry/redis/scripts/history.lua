-- Reads a part of a channel's history; gives the channel state when it has none.
-- KEYS: the channel's state, its dedupe keys, its history.
-- ARGV: the name of a new epoch, the epoch and offset to read behind or nothing and 0 for the newest, most
-- publications, most bytes, how many the channel may keep, for how many milliseconds.
-- Answers {epoch, newest offset, whether the epoch is new, whether the position is lost, whether more follow,
-- envelopes in order}.
local STEP = 32

local state, log = KEYS[1], KEYS[3]
local since, limit, most_bytes = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local epoch, top, opened, kept = position(state, KEYS[2], log, ARGV[1])
keep_alive(state)
-- What stands at or below this offset, or is older than this time, is kept no more.
local floor = kept and math.max(top - tonumber(ARGV[6]), 0) or top
local oldest = now_ms() - tonumber(ARGV[7])

local function lost()
  return {epoch, top, opened, 1, 0, {}}
end

local function parts(entry)
  local offset, time = string.match(entry[1], '^(%d+)-(%d+)$')
  return tonumber(offset), tonumber(time), entry[2][2]
end

local found, bytes = {}, 0

-- Adds what there is room for; false when there is none.
local function add(envelope)
  bytes = bytes + #envelope
  if #found >= limit or (#found > 0 and bytes > most_bytes) then
    return false
  end
  found[#found + 1] = envelope
  return true
end

local function read_newest()
  local before = '+'
  while true do
    local entries = redis.call('XREVRANGE', log, before, '-', 'COUNT', STEP)
    for _, entry in ipairs(entries) do
      local offset, time, envelope = parts(entry)
      if offset <= floor or time <= oldest or not add(envelope) then
        return
      end
      before = string.format('%.0f-0', offset)
    end
    if #entries < STEP then
      return
    end
  end
end

if ARGV[2] == '' then
  if floor < top then
    read_newest()
  end
  local ordered = {}
  for at = #found, 1, -1 do
    ordered[#ordered + 1] = found[at]
  end
  return {epoch, top, opened, 0, 0, ordered}
end

if ARGV[2] ~= epoch or since > top or since < floor then
  return lost()
end
local last = since
while last < top do
  local entries = redis.call('XRANGE', log, string.format('%.0f-0', last + 1), '+', 'COUNT', STEP)
  local full = false
  for _, entry in ipairs(entries) do
    local offset, time, envelope = parts(entry)
    -- The first must be the very next, and not too old; those behind it are then there and newer.
    if offset ~= last + 1 or time <= oldest then
      return lost()
    end
    if not add(envelope) then
      full = true
      break
    end
    last = offset
  end
  if full then
    break
  end
  if #entries == 0 then
    return lost()
  end
end
return {epoch, top, opened, 0, last < top and 1 or 0, found}
