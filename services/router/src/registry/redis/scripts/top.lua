-- Where a channel stands; gives it state when it has none, and keeps that from expiring.
-- KEYS: the channel's state, its dedupe keys. ARGV: the name of a new epoch.
-- Answers {epoch, newest offset, whether the epoch is new}.
local epoch, top, opened = position(KEYS[1], KEYS[2], ARGV[1])
redis.call('PEXPIRE', KEYS[1], IDLE_MS)
return {epoch, top, opened}
