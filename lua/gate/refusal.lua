-- Who need not wait, or waits no longer, and how that is said. No state.

local activity = require "gate.activity"
local balancer = require "gate.balancer"
local clock = require "gate.clock"
local notifier = require "gate.notifier"
local prefer = require "gate.prefer"
local problem = require "gate.problem"
local registry = require "gate.registry"
local store = require "gate.store"

local ipairs = ipairs
local max = math.max
local min = math.min
local pairs = pairs
local tonumber = tonumber
local type = type

local PACING_GRACE_S = 1   -- even with a shorter wish, when the service is ready and only paced
local LEASE_FACTOR, LEASE_EXTRA_S = 2, 60
local UNKNOWN_HOLD_S = 3600 -- of a request that came before any snapshot
local ALL_TAKEN = "The service is as busy as it may be; the request was held as long as it may be."

-- Problems after which the client is expected back, so that the service stays wanted
local LEAVES_LEASE = { ["hold-timeout"] = true, ["too-many-waiting"] = true }

-- Problems that have nothing to do with how its service is
local OF_THE_SENDER = {
    unauthorized = true, forbidden = true, ["too-many-requests"] = true,
    ["too-many-in-flight"] = true,
}

local _M = {}

--- The client's own bound in seconds (RFC 7240), out of any of several header lines.
function _M.wish()
    local lines = ngx.req.get_headers(0)["prefer"]
    if type(lines) == "string" then
        return prefer.wait(lines)
    end
    for _, line in ipairs(lines or {}) do
        local wish = prefer.wait(line)
        if wish then
            return wish
        end
    end
    return nil
end

--- Answer a request with a problem; it gives back all it holds. `more` are facts beside those about
--- its service. Does not return.
function _M.send(var, code, more)
    local service = registry.find(var.sg_service)
    activity.abandon(var)
    if not service then
        return problem.send(code, more or {})
    elseif OF_THE_SENDER[code] then
        more = more or {}
        more.service = service.name
        return problem.send(code, more)
    end
    local now = clock.now()
    local facts = problem.service_facts(service, var.sg_private == "1", code, now)
    for name, value in pairs(more or {}) do
        facts[name] = value
    end
    if code == "hold-timeout" and balancer.full(service) then
        -- The backend's estimate is of a start, and this service runs.
        facts.detail, facts.estimate = ALL_TAKEN, nil
    end
    if LEAVES_LEASE[code] and var.sg_passive ~= "1" then
        local retry = problem.retry_after(code, facts.estimate)
        store.want(service.name, now, now + LEASE_FACTOR * retry + LEASE_EXTRA_S)
        notifier.kick()
    end
    return problem.send(code, facts)
end

--- The code with which a request is refused whose service does not run and will not; or nil.
function _M.without_waiting(var, service)
    if #service.routable > 0 then
        return nil
    elseif var.sg_passive == "1" then
        return "not-running"
    elseif service.refusal then
        return service.refusal.code
    end
    return nil
end

--- Whether a request has waited as long as it may; `wish` is the client's own bound.
function _M.too_late(var, service, wish)
    local limit = min(service and service.hold_timeout or UNKNOWN_HOLD_S, wish or math.huge)
    local waited = clock.now() - tonumber(var.sg_since)
    if waited < limit then
        return false
    end
    local only_paced = service and #service.routable > 0 and not balancer.full(service)
    return not only_paced or waited >= max(limit, PACING_GRACE_S)
end

return _M
