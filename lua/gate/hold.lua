-- The waiting room. Per worker and service a queue; each waiter has its own semaphore. Only the
-- first few that pacing allows are woken, and newcomers do not overtake. A grant reserves nothing:
-- a woken waiter tries to be admitted itself, so one whose client vanished leaks nothing.
--
-- All state here is per worker: the rooms and the waiters by ticket. The ticket stands in an nginx
-- variable, because after a client's abort only the log phase runs.

local semaphore = require "ngx.semaphore"

local activity = require "gate.activity"
local balancer = require "gate.balancer"
local client = require "gate.client"
local clock = require "gate.clock"
local notifier = require "gate.notifier"
local prefer = require "gate.prefer"
local problem = require "gate.problem"
local registry = require "gate.registry"
local settings = require "gate.settings"
local store = require "gate.store"

local format = string.format
local max = math.max
local min = math.min
local pairs = pairs
local random = math.random
local tonumber = tonumber
local type = type

local CLIENT_GONE = 499
local LOOK_EVERY_S = 0.25  -- no wait is longer: a waiter depends on nobody waking it
local LEAST_WAIT_S = 0.001
local PACING_GRACE_S = 1   -- even with a shorter wish, when the service is ready and only paced
local LEASE_FACTOR, LEASE_EXTRA_S = 2, 60
local MAX_TRIES = 9        -- nginx allows ten internal redirects; the way here took one
local RETRY_MIN_S, RETRY_MAX_S = 0.01, 0.05
local BODY_TURN_S = 5      -- longest wait for the turn to read a body of unknown length
local TOO_MANY_BYTES = "Bodies of waiting requests take as many bytes as may be held."
local UNKNOWN = "-"        -- room of requests that came before any snapshot
local UNKNOWN_HOLD_S, UNKNOWN_MAX_WAITING = 3600, 10000

-- Problems after which the client is expected back, so that the service stays wanted
local LEAVES_LEASE = { ["hold-timeout"] = true, ["too-many-waiting"] = true }

local rooms = {}   -- service name → {first, last}
local waiters = {} -- ticket → waiter
local tickets = 0

local _M = {}

-- Rooms --------------------------------------------------------------------------------------

local function link(waiter, name)
    local room = rooms[name]
    if not room then
        room = {}
        rooms[name] = room
    end
    waiter.name, waiter.before, waiter.after = name, room.last, nil
    if room.last then
        room.last.after = waiter
    else
        room.first = waiter
    end
    room.last = waiter
end

local function unlink(waiter)
    local room = rooms[waiter.name]
    if waiter.before then
        waiter.before.after = waiter.after
    else
        room.first = waiter.after
    end
    if waiter.after then
        waiter.after.before = waiter.before
    else
        room.last = waiter.before
    end
    if not room.first then
        rooms[waiter.name] = nil
    end
end

local function join(var, name, since)
    tickets = tickets + 1
    local ticket = format("%d", tickets)
    local waiter = { ticket = ticket, semaphore = semaphore.new(0), granted = false, since = since }
    link(waiter, name)
    waiters[ticket] = waiter
    var.sg_ticket = ticket
    return waiter
end

local function leave(var, waiter)
    unlink(waiter)
    waiters[waiter.ticket] = nil
    var.sg_ticket = ""
    activity.end_waiting(var)
end

local function grant(waiter)
    if not waiter.granted then
        waiter.granted = true
        waiter.semaphore:post(1)
    end
end

local function everyone_leaves(name)
    if name == UNKNOWN then
        return registry.version() ~= nil
    end
    local service = registry.find(name)
    return not service or (#service.routable == 0 and service.refusal ~= nil)
end

--- Wake the first waiters of a service, as many as may go on now.
function _M.advance(name)
    local room = rooms[name]
    if not room then
        return
    end
    local left
    if everyone_leaves(name) then
        left = math.huge
    else
        local service = registry.find(name)
        left = service and balancer.capacity(service) or 0
    end
    local waiter = room.first
    while waiter and left > 0 do
        grant(waiter)
        left = left - 1
        waiter = waiter.after
    end
end

--- The same for all services; the tick, and whoever stored a new snapshot.
function _M.advance_all()
    for name in pairs(rooms) do
        _M.advance(name)
    end
end

--- Whether anyone waits for a service in this worker: then newcomers queue.
function _M.busy(name)
    return rooms[name] ~= nil
end

--- Whether anyone waits at all in this worker.
function _M.any()
    return next(rooms) ~= nil
end

--- Take a request out of its room, wherever it ended; the log phase.
function _M.forget(var)
    local waiter = next(waiters) and waiters[var.sg_ticket]
    if waiter then
        leave(var, waiter)
    end
end

-- Refusals -----------------------------------------------------------------------------------

-- The client's own bound in seconds (RFC 7240), out of any of several header lines
local function prefer_wait()
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

local function turn_away(var, code, detail)
    local service = registry.find(var.sg_service)
    activity.abandon(var)
    if not service then
        return problem.send(code, { detail = detail })
    end
    local now = clock.now()
    local facts = problem.service_facts(service, var.sg_private == "1", code, now)
    facts.detail = detail
    if LEAVES_LEASE[code] and var.sg_passive ~= "1" then
        local retry = problem.retry_after(code, facts.estimate)
        store.want(service.name, now, now + LEASE_FACTOR * retry + LEASE_EXTRA_S)
        notifier.kick()
    end
    return problem.send(code, facts)
end

local function refusal_without_waiting(var, service)
    if #service.routable > 0 then
        return nil
    elseif var.sg_passive == "1" then
        return "not-running"
    elseif service.refusal then
        return service.refusal.code
    end
    return nil
end

local function begin(var, service)
    local limit = service and service.max_waiting or UNKNOWN_MAX_WAITING
    if activity.begin_waiting(var, service and service.name or UNKNOWN) > limit then
        return "too-many-waiting"
    end
    return nil
end

-- A body of unknown length may take all that is left, but only while it is read: others of unknown
-- length wait a moment for their turn.
local function reserve_what_is_left(var)
    local deadline = clock.now() + BODY_TURN_S
    repeat
        local left = settings.max_held_bytes - activity.reserved()
        if left > 0 then
            if activity.reserve(var, min(settings.max_body, left)) <= settings.max_held_bytes then
                return true
            end
            activity.reserve(var, 0)
        end
        ngx.sleep(RETRY_MIN_S + random() * (RETRY_MAX_S - RETRY_MIN_S))
    until clock.now() > deadline
    return false
end

-- Read the body, with as many bytes reserved as it takes; an abort of the client is seen only by a
-- location that begins after that. Returns whether it may be held.
local function read_body(var)
    local length = tonumber(var.http_content_length)
    local unknown = not length and var.request_method ~= "GET"
        and (var.http_transfer_encoding or var.server_protocol == "HTTP/2.0")
    local may = true
    if unknown then
        may = reserve_what_is_left(var)
    elseif length and length > 0 then
        may = activity.reserve(var, length) <= settings.max_held_bytes
    end
    if not may then
        return false
    end
    ngx.req.read_body()
    if unknown then
        local taken = min(settings.max_body, tonumber(var.request_length))
        return activity.reserve(var, taken) <= settings.max_held_bytes
    end
    return true
end

-- Waiting ------------------------------------------------------------------------------------

local function lost_twice(var)
    local ends = 0
    local sent_to = var.sg_sent_to
    if sent_to == "" then
        return false
    end
    for id in sent_to:gmatch("%S+") do
        if registry.ended(id) then
            ends = ends + 1
        end
    end
    return ends >= 2
end

local function too_late(var, service, wish)
    local limit = min(service and service.hold_timeout or UNKNOWN_HOLD_S, wish or math.huge)
    if service and #service.routable > 0 then
        limit = max(limit, PACING_GRACE_S)
    end
    return clock.now() >= tonumber(var.sg_since) + limit
end

-- The first snapshot may tell what the request is for.
local function find_out(var, waiter)
    local target, query = registry.match(var.request_uri)
    if target.kind == "no-such-route" and not registry.complete() then
        return nil
    elseif target.kind ~= "service" then
        return nil, target.kind
    end
    local service = target.service
    unlink(waiter)
    link(waiter, service.name)
    activity.arrive(var, target, query)
    if activity.wait_for(var, service.name) > service.max_waiting then
        return nil, "too-many-waiting"
    end
    notifier.kick()
    return service
end

local function try(var, waiter, service)
    local first = rooms[waiter.name].first == waiter
    if not (waiter.granted or first) then
        return nil
    end
    local granted = waiter.granted
    waiter.granted = false
    local replica = balancer.admit(var, service)
    return replica, replica and not granted
end

-- Its service was removed: whoever had been let through to it had asked for the right route.
local function without_service(var, sent)
    return (sent or var.sg_sent_to ~= "") and "upstream-failed" or "no-such-route"
end

-- One look at everything a waiter waits for: a replica, or the code of what ends the wait, or
-- neither.
local function look(var, waiter, wish)
    local service, code
    if waiter.name == UNKNOWN then
        service, code = find_out(var, waiter)
        if not service then
            waiter.granted = false
            return nil, code or (too_late(var, nil, wish) and "not-ready" or nil)
        end
    else
        service = registry.find(waiter.name)
    end
    if service and lost_twice(var) then
        return nil, "upstream-failed"
    end
    local replica, unasked
    if service then
        replica, unasked = try(var, waiter, service)
        -- Trying may have brought a newer view.
        service = registry.find(waiter.name)
    end
    if replica then
        return replica, nil, unasked
    elseif not service then
        return nil, without_service(var, false)
    end
    code = refusal_without_waiting(var, service)
    return nil, code or (too_late(var, service, wish) and "hold-timeout" or nil)
end

local function note_waited(var, waiter)
    local before = tonumber(var.sg_waited) or 0
    var.sg_waited = format("%.3f", before + clock.now() - waiter.since)
end

local function go_on(var, waiter)
    local name = waiter.name
    leave(var, waiter)
    note_waited(var, waiter)
    var.sg_tries = (tonumber(var.sg_tries) or 0) + 1
    var.sg_off = ""
    return name
end

local function client_gone(var)
    -- On a connection of many requests nginx itself notices the end of each.
    return var.server_protocol ~= "HTTP/2.0" and client.gone()
end

local function wait(var, since)
    if client_gone(var) then
        return ngx.exit(CLIENT_GONE)
    end
    local waiter = join(var, var.sg_service == "" and UNKNOWN or var.sg_service, since)
    local wish = prefer_wait()
    while true do
        registry.refresh()
        local replica, code, unasked = look(var, waiter, wish)
        if replica then
            local name = go_on(var, waiter)
            if unasked then
                _M.advance(name)
            end
            return
        elseif code then
            leave(var, waiter)
            note_waited(var, waiter)
            return turn_away(var, code)
        end
        local last_look = tonumber(var.sg_since) + (wish or math.huge) - clock.now()
        local woken = waiter.semaphore:wait(max(LEAST_WAIT_S, min(LOOK_EVERY_S, last_look)))
        -- nginx does not see an end behind the next request that the client has sent already.
        if not woken and client_gone(var) then
            return ngx.exit(CLIENT_GONE)
        end
    end
end

--- Send a request that cannot be routed now to the waiting room, or refuse it; the access phase of
--- the public location. `service` is nil while the route is not known. Does not return.
function _M.enter(var, service)
    local since = clock.now()
    var.sg_since = since
    local code = service and refusal_without_waiting(var, service)
    if code and notifier.confirm() then
        service = registry.find(service.name)
        code = service and refusal_without_waiting(var, service) or not service and "no-such-route"
    end
    if code then
        return turn_away(var, code)
    end
    local cold = service and #service.routable == 0
    if cold and prefer_wait() == 0 then
        return turn_away(var, "hold-timeout")
    end
    code = begin(var, service)
    if code then
        return turn_away(var, code)
    end
    if cold and not rooms[service.name] then
        notifier.kick()
    end
    if not read_body(var) then
        return turn_away(var, "too-many-waiting", TOO_MANY_BYTES)
    end
    return ngx.exec("@hold")
end

--- Wait for a replica; the access phase of @hold. Returns when the peer is chosen.
function _M.wait(var)
    return wait(var, tonumber(var.sg_since))
end

-- Again --------------------------------------------------------------------------------------

local function verdict(var, sent, service)
    local timed_out = activity.last_of(var.upstream_status) == "504"
    if sent > 0 and timed_out then
        return "upstream-timeout"
    elseif not service then
        return without_service(var, sent > 0)
    elseif sent == 0 then
        return tonumber(var.sg_tries) >= MAX_TRIES and "upstream-failed" or nil
    elseif (tonumber(activity.last_of(var.upstream_bytes_received)) or 0) > 0
        or (tonumber(var.sg_replays) or 0) >= service.replay
        or tonumber(var.sg_tries) >= MAX_TRIES then
        return "upstream-failed"
    end
    return nil
end

local function note_sent(var, id)
    var.sg_replays = (tonumber(var.sg_replays) or 0) + 1
    if not (" " .. var.sg_sent_to .. " "):find(" " .. id .. " ", 1, true) then
        var.sg_sent_to = var.sg_sent_to .. " " .. id
    end
end

--- Decide about a request whose try failed: hold it again, or give up; the access phase of @again.
function _M.again(var)
    local since = clock.now()
    local id = activity.drop_replica(var)
    local sent = tonumber(activity.last_of(var.upstream_bytes_sent)) or 0
    local service = registry.find(var.sg_service)
    local code = verdict(var, sent, service)
    if sent == 0 then
        balancer.connect_failed(id)
    elseif code ~= "upstream-timeout" then
        balancer.broke_off(id)
    end
    if code then
        return turn_away(var, code)
    end
    if sent > 0 then
        note_sent(var, id)
    else
        ngx.sleep(RETRY_MIN_S + random() * (RETRY_MAX_S - RETRY_MIN_S))
    end
    if var.sg_since == "" then
        var.sg_since = since
    end
    activity.begin_waiting(var, var.sg_service)
    notifier.kick()
    return wait(var, since)
end

return _M
