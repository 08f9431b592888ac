-- What the scripts about a channel begin with. RUN_ID is that of the Redis process which this text was loaded
-- into: no other process ever runs it, since the text of a process is loaded only over a connection to it.
local RUN_ID = '@RUN_ID@'
local IDLE_MS = @IDLE_MS@

-- Epoch and newest offset of the channel, 1 when it begins a new epoch, and whether its history has no hole. An offset
-- that another process assigned may have been lost since, so a channel that another process touched last never goes on,
-- and what it kept goes with its epoch.
local function position(state, keys, log, new_epoch)
  local held = redis.call('HMGET', state, 'epoch', 'run_id', 'top', 'kept')
  if held[2] == RUN_ID then
    return held[1], tonumber(held[3]), 0, held[4]
  end
  redis.call('HSET', state, 'epoch', new_epoch, 'run_id', RUN_ID, 'top', 0)
  redis.call('HDEL', state, 'kept')
  redis.call('DEL', keys, log)
  return new_epoch, 0, 1, false
end

-- Keeps the channel's state from expiring for a while; longer where its history may live longer.
local function keep_alive(state)
  if redis.call('PTTL', state) < IDLE_MS then
    redis.call('PEXPIRE', state, IDLE_MS)
  end
end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

