-- The number of a new attachment: above all before it, and not below the time, so that a server that lost the
-- latest one does not give out any a second time.
-- KEYS: the latest number.
local time = redis.call('TIME')
local number = time[1] * 1000000 + time[2]
local latest = tonumber(redis.call('GET', KEYS[1]) or 0)
if number <= latest then
  number = latest + 1
end
local text = string.format('%.0f', number)
redis.call('SET', KEYS[1], text)
return text
