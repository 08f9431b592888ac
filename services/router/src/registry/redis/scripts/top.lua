-- Where a channel stands; gives it state when it has none, and keeps that from expiring.
-- KEYS: the channel's state, its dedupe keys, its history. ARGV: the name of a new epoch.
-- Answers {epoch, newest offset, whether the epoch is new}.
local epoch, top, opened = position(KEYS[1], KEYS[2], KEYS[3], ARGV[1])
keep_alive(KEYS[1])
return {epoch, top, opened}
