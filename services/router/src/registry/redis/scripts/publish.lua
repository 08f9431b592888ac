-- Publishes to a channel, unless its dedupe key is known.
-- KEYS: the channel's state, its dedupe keys, its pub/sub name, its history.
-- ARGV: the name of a new epoch, the envelope without stamp, the encoded field `time_us` of the stamp, the dedupe
-- key or nothing, what is remembered under it, how many publications the channel keeps, for how many milliseconds.
-- Answers {0, epoch, offset, whether the epoch is new} or {1, epoch, offset of the first, what is remembered}.
local WINDOW_MS = @WINDOW_MS@
local MOST_KEYS = @MOST_KEYS@

local state, keys, log = KEYS[1], KEYS[2], KEYS[4]
local dedupe_key = ARGV[4]
local size, ttl_ms = tonumber(ARGV[6]), tonumber(ARGV[7])

-- Forgets the key with this number, which is the oldest.
local function forget(number)
  local key = redis.call('HGET', keys, 'n' .. number)
  if key then
    local record = redis.call('HGET', keys, 'k' .. key)
    -- A key that had expired may have been taken anew, under a later number.
    if record and tonumber(string.match(record, '^%d+')) == number then
      redis.call('HDEL', keys, 'k' .. key)
    end
    redis.call('HDEL', keys, 'n' .. number)
  end
end

local function has_expired(number, now)
  local key = redis.call('HGET', keys, 'n' .. number)
  local record = key and redis.call('HGET', keys, 'k' .. key)
  if not record then
    return true
  end
  local held, expires = string.match(record, '^(%d+) (%d+) ')
  return tonumber(held) ~= number or tonumber(expires) <= now
end

local function remember(offset, now)
  local held = redis.call('HMGET', keys, 'first', 'last')
  local first, last = tonumber(held[1] or 1), tonumber(held[2] or 0) + 1
  while last - first >= MOST_KEYS do
    forget(first)
    first = first + 1
  end
  -- Two for each that is added: what has expired goes faster than keys come.
  for _ = 1, 2 do
    if first < last and has_expired(first, now) then
      forget(first)
      first = first + 1
    end
  end
  local record = string.format('%d %.0f %.0f ', last, now + WINDOW_MS, offset) .. ARGV[5]
  redis.call('HSET', keys, 'first', first, 'last', last, 'n' .. last, dedupe_key, 'k' .. dedupe_key, record)
  redis.call('PEXPIRE', keys, WINDOW_MS)
end

local function varint(number)
  local bytes = ''
  while number >= 128 do
    bytes = bytes .. string.char(number % 128 + 128)
    number = math.floor(number / 128)
  end
  return bytes .. string.char(number)
end

-- Adds the newest publication to the history, of which it drops what is too much.
local function keep(offset, envelope, is_kept)
  if not is_kept then
    redis.call('HSET', state, 'kept', 1)
  end
  local id = string.format('%.0f-%.0f', offset, now_ms())
  redis.call('XADD', log, 'MAXLEN', size, id, 'e', envelope)
  redis.call('PEXPIRE', log, ttl_ms)
end

local epoch, top, opened, kept = position(state, keys, log, ARGV[1])
redis.call('PEXPIRE', state, size > 0 and math.max(IDLE_MS, ttl_ms) or IDLE_MS)
local now
if dedupe_key ~= '' then
  now = now_ms()
  local record = redis.call('HGET', keys, 'k' .. dedupe_key)
  if record then
    local expires, offset, answer = string.match(record, '^%d+ (%d+) (%d+) (.*)$')
    if tonumber(expires) > now then
      return {1, epoch, tonumber(offset), answer}
    end
  end
end

top = top + 1
redis.call('HSET', state, 'top', string.format('%.0f', top))
if dedupe_key ~= '' then
  remember(top, now)
end
-- Field `stamp` of the envelope, which is shorter than 128 bytes: `epoch`, `offset`, `time_us`.
local stamp = '\10' .. string.char(#epoch) .. epoch .. '\16' .. varint(top) .. ARGV[3]
local envelope = ARGV[2] .. '\42' .. string.char(#stamp) .. stamp
if size > 0 then
  keep(top, envelope, kept)
elseif kept then
  -- What comes back later must not continue behind a hole.
  redis.call('HDEL', state, 'kept')
  redis.call('DEL', log)
end
redis.call('@PUBLISH@', KEYS[3], envelope)
return {0, epoch, top, opened}
