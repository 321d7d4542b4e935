-- How much a key may ask for: requests within a minute, and requests in flight. What is over is
-- given back at once, so a refused request takes nothing from the next. Pure arithmetic over counts
-- in the store: no lock, no yield.
--
-- Shared (through the store): requests of each key in each second of the last minute; requests in
-- flight of each key under this worker's tag, so that those of a dead worker are forgotten; running
-- totals of requests and refusals. Per worker: counts in flight held, and in the key's table the
-- sum of the seconds before this one.

local clock = require "gate.clock"
local store = require "gate.store"

local ceil = math.ceil
local floor = math.floor
local format = string.format
local max = math.max

local WINDOW = 60      -- seconds, this one among them
local KEPT_S = WINDOW + 1
local IN_FLIGHT_RETRY_S = 1

local held = 0 -- counts in flight that requests of this worker hold

local _M = {}

--- Give a key's table what the counts need; `entry` has a name, rpm and in_flight (0: no bound).
function _M.prepare(entry)
    entry.count_key = store.tag() .. ":k:" .. entry.name
    entry.sum_key = ":k:" .. entry.name
    entry.requests_key = "key requests:" .. entry.name
    entry.refused_key = "key refused:" .. entry.name
    entry.seconds_key = entry.name .. ":"
end

-- Within a minute ----------------------------------------------------------------------------

-- Seconds that are over change no more: their sum is read once a second.
local function roll(entry, second)
    if entry.second == second then
        return
    end
    local sum = 0
    for past = second - WINDOW + 1, second - 1 do
        sum = sum + store.rated(entry.seconds_key .. past)
    end
    entry.second, entry.before = second, sum
    entry.second_key = entry.seconds_key .. second
end

local function within_rate(entry, now)
    roll(entry, floor(now))
    if entry.before + store.rated(entry.second_key) >= entry.rpm then
        return false
    end
    if entry.before + store.rate(entry.second_key, 1, KEPT_S) > entry.rpm then
        store.rate(entry.second_key, -1, KEPT_S)
        return false
    end
    return true
end

-- Seconds until enough of the requests that count now are a minute old
local function rate_free_in(entry, now)
    local over = entry.before + store.rated(entry.second_key) - entry.rpm + 1
    for past = entry.second - WINDOW + 1, entry.second do
        over = over - store.rated(entry.seconds_key .. past)
        if over <= 0 then
            return max(0, past + WINDOW - now)
        end
    end
    return 1
end

-- What is said of a refusal ------------------------------------------------------------------

local function policies(entry)
    local rate = entry.rpm > 0 and format('"requests";q=%d;w=%d', entry.rpm, WINDOW)
    local bound = entry.in_flight > 0
        and format('"in-flight";q=%d;qu="concurrent-requests"', entry.in_flight)
    return rate and bound and rate .. ", " .. bound or rate or bound
end

-- The names in wide use, and those of the draft (draft-ietf-httpapi-ratelimit-headers)
local function refusal(entry, policy, limit, free_in)
    local reset = max(1, ceil(free_in))
    return {
        estimate = free_in,
        headers = {
            ["RateLimit-Limit"] = limit,
            ["RateLimit-Remaining"] = 0,
            ["RateLimit-Reset"] = reset,
            ["RateLimit-Policy"] = policies(entry),
            ["RateLimit"] = format('"%s";r=0;t=%d', policy, reset),
        },
    }
end

-- Taking and giving back ---------------------------------------------------------------------

local function drop(count_key)
    store.count(count_key, -1)
    held = held - 1
end

--- Note a request with a key that was refused.
function _M.refused(entry)
    store.count(entry.refused_key, 1)
end

--- Note a request with a key that needs none.
function _M.note(entry)
    store.count(entry.requests_key, 1)
end

--- Count a request on a key, in flight until `give_back`: true, or nil with a code and facts.
function _M.take(entry)
    -- Counted before it is compared: of those who try for the last place at once none may get it,
    -- but never two.
    store.count(entry.count_key, 1)
    held = held + 1
    local bound = entry.in_flight
    if bound > 0 and store.sum(store.workers(), entry.sum_key) > bound then
        drop(entry.count_key)
        _M.refused(entry)
        return nil, "too-many-in-flight", refusal(entry, "in-flight", bound, IN_FLIGHT_RETRY_S)
    end
    if entry.rpm > 0 then
        local now = clock.now()
        if not within_rate(entry, now) then
            drop(entry.count_key)
            _M.refused(entry)
            local free_in = rate_free_in(entry, now)
            return nil, "too-many-requests", refusal(entry, "requests", entry.rpm, free_in)
        end
    end
    store.count(entry.requests_key, 1)
    return true
end

--- A request counted on the key of that name has ended.
function _M.give_back(name)
    drop(store.tag() .. ":k:" .. name)
end

--- Counts in flight that requests of this worker hold on keys.
function _M.held()
    return held
end

--- What there is to tell about a key, or nil if it was never used.
function _M.report(tags, entry)
    local requests = store.counted(entry.requests_key)
    local refused = store.counted(entry.refused_key)
    local in_flight = store.sum(tags, entry.sum_key)
    if requests == 0 and refused == 0 and in_flight == 0 then
        return nil
    end
    return { requests = requests, refused = refused, in_flight = in_flight }
end

return _M
