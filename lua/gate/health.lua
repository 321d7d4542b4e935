-- Polls the health path of every replica that is starting or ready; only the leading worker does.
-- Per worker: one poller per generation of a replica (when it is due, failures in a row). Shared
-- (through the store): the results, so another leader goes on from there.

local clock = require "gate.clock"
local http = require "gate.http"
local notifier = require "gate.notifier"
local registry = require "gate.registry"
local store = require "gate.store"

local timer_at = ngx.timer.at
local max = math.max
local min = math.min
local pairs = pairs

local BODY_LIMIT = 65536
local RESULT_TTL_S = 600
local SETTLE_S = 0.1
local START_SHARE = 0.01 -- of the age of a starting replica: its poll interval

local pollers = {} -- "id:gen" → {busy, due, began, failures}

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
    judge(poller, replica, passed, err or answer and "status " .. answer.status)
    poller.due = max(poller.began + pace(replica, poller.began), clock.now())
    poller.busy = false
end

local function polled(replica)
    return replica.endpoint and (replica.phase == "starting" or replica.phase == "ready")
end

local function due(poller, replica, now)
    if poller.busy then
        return false
    end
    local suspected = store.suspected(replica.id, replica.gen)
    return now >= poller.due or (suspected and suspected > poller.began)
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
            if due(poller, replica, now) then
                poller.busy = true
                poller.began = now
                poller.due = now
                local ok, err = timer_at(0, poll, poller, replica)
                if not ok then
                    poller.busy = false
                    ngx.log(ngx.WARN, "poll timer: ", err)
                end
            end
        end
    end
    pollers = seen
    return starting
end

return _M
