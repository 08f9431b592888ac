-- What the scripts about a channel begin with. RUN_ID is that of the Redis process which this text was loaded
-- into: no other process ever runs it, since the text of a process is loaded only over a connection to it.
local RUN_ID = '@RUN_ID@'
local IDLE_MS = @IDLE_MS@

-- Epoch and newest offset of the channel, and 1 when it begins a new epoch. An offset that another process
-- assigned may have been lost since, so a channel that another process touched last never goes on.
local function position(state, keys, new_epoch)
  local held = redis.call('HMGET', state, 'epoch', 'run_id', 'top')
  if held[2] == RUN_ID then
    return held[1], tonumber(held[3]), 0
  end
  redis.call('HSET', state, 'epoch', new_epoch, 'run_id', RUN_ID, 'top', 0)
  redis.call('DEL', keys)
  return new_epoch, 0, 1
end

