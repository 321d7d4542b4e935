-- Polls the health path of every replica that is starting or ready; only the leading worker does.
-- When a replica breaks off, those beside it are polled out of turn (replays.lua).
-- Per worker: one poller per generation of a replica (when it is due, failures in a row). Shared
-- (through the store): the results, so another leader goes on from there.

local clock = require "gate.clock"
local http = require "gate.http"
local notifier = require "gate.notifier"
local registry = require "gate.registry"
local replays = require "gate.replays"
local store = require "gate.store"

local timer_at = ngx.timer.at
local max = math.max
local min = math.min
local pairs = pairs

local BODY_LIMIT = 65536
local RESULT_TTL_S = 600
local SETTLE_S = 0.1
local START_SHARE = 0.01 -- of the age of a starting replica: its poll interval

-- How a poll ends where nobody is
local NOBODY = {
    ["closed"] = true, ["connection reset by peer"] = true, ["connection refused"] = true,
    ["broken pipe"] = true, ["no such file or directory"] = true,
}

local pollers = {} -- "id:gen" → {busy, due, began, failures, extra}

local _M = {}

local function pace(replica, now)
    local health = replica.service.health
    local quickest, slowest = health.start_interval[1], health.start_interval[2]
    if replica.phase == "starting" then
        local age = now - replica.running_since
        return min(slowest, max(quickest, age * START_SHARE))
    end
    local suspected = store.suspected(replica.id, replica.gen)
    if suspected then
        -- It gets no request meanwhile. A burst is over soon, a death is not.
        return min(slowest, max(quickest, now - suspected))
    end
    return health.interval
end

local function recently_answered(replica, now)
    local health = replica.service.health
    local answered = max(replica.answered, store.time("answered:" .. replica.id) or 0)
    local suspected = store.suspected(replica.id, replica.gen)
    return now - answered < health.interval * health.failures
        and (not suspected or answered > suspected)
end

local function judge(poller, replica, passed, words)
    local before = store.health(replica.id, replica.gen)
    local after, detail = before, ""
    if passed then
        poller.failures = 0
        after = "up"
        local suspected = store.suspected(replica.id, replica.gen)
        if suspected and suspected <= poller.began then
            store.trust(replica.id, replica.gen)
        end
    else
        poller.failures = poller.failures + 1
        detail = "last poll: " .. words:gsub("^connect: ", "")
        if replica.phase == "ready" and recently_answered(replica, clock.now()) then
            after = "up"
        elseif poller.failures >= replica.service.health.failures then
            after = "down"
        end
    end
    local ttl = max(RESULT_TTL_S, 3 * replica.service.health.interval)
    store.set_health(replica.id, replica.gen, after, detail, ttl)
    if after ~= before then
        notifier.kick()
    end
end

-- Only while it loads: then nearly every poll is refused.
local function settle(replica)
    local tunnelled = replica.endpoint:sub(1, 5) == "unix:"
    return tunnelled and replica.phase == "starting" and SETTLE_S or nil
end

-- What a poll says about a replica beside one that broke off. Too slow an answer says nothing: busy
-- ones are.
local function judge_doubted(poller, replica, answer, err)
    if answer then
        replays.answered_poll(replica, poller.began)
    elseif NOBODY[err:gsub("^%a+: ", "")] then
        store.suspect(replica.id, replica.gen, clock.now(), RESULT_TTL_S)
    end
end

local function poll(_, poller, replica)
    local health = replica.service.health
    local done, answer, err = pcall(http.request, {
        endpoint = replica.endpoint, method = "GET", path = health.path, timeout = health.timeout,
        headers = replica.key and { Authorization = "Bearer " .. replica.key },
        limit = BODY_LIMIT, status_only = true, settle = settle(replica),
    })
    if not done then
        answer, err = nil, answer
    end
    local passed = answer and answer.status == 200
    if replays.doubted(replica) then
        judge_doubted(poller, replica, answer, err)
    end
    -- Failures in a row are those of polls an interval apart.
    if passed or not poller.extra then
        judge(poller, replica, passed, err or answer and "status " .. answer.status)
        poller.due = max(poller.began + pace(replica, poller.began), clock.now())
    end
    poller.busy = false
end

local function polled(replica)
    return replica.endpoint and (replica.phase == "starting" or replica.phase == "ready")
end

local function due(poller, replica, now)
    local suspected = store.suspected(replica.id, replica.gen)
    return now >= poller.due or (suspected and suspected > poller.began)
end

local function begin(poller, replica, now)
    poller.busy = true
    poller.began = now
    local ok, err = timer_at(0, poll, poller, replica)
    if not ok then
        poller.busy = false
        ngx.log(ngx.WARN, "poll timer: ", err)
    end
end

--- Start the polls that are due; the leader's tick. Returns whether any replica is starting.
function _M.tick(now)
    local seen, starting = {}, false
    for id, replica in pairs(registry.replicas()) do
        if polled(replica) then
            local name = id .. ":" .. replica.gen
            local poller = pollers[name] or { busy = false, due = now, began = 0, failures = 0 }
            seen[name] = poller
            starting = starting or replica.phase == "starting"
            if not poller.busy then
                local in_turn = due(poller, replica, now)
                if in_turn or replays.poll_due(replica, poller.began, now) then
                    poller.extra = not in_turn
                    begin(poller, replica, now)
                end
            end
        end
    end
    pollers = seen
    return starting
end

return _M
