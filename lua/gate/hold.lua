-- Requests that wait: each looks again when it is woken, or after a quarter of a second, with one
-- deadline for all its tries. Who is woken, and when, is the business of the rooms. No state: what
-- a request is and has stands in nginx variables.

local activity = require "gate.activity"
local balancer = require "gate.balancer"
local bodies = require "gate.bodies"
local client = require "gate.client"
local clock = require "gate.clock"
local inner = require "gate.inner"
local keys = require "gate.keys"
local notifier = require "gate.notifier"
local refusal = require "gate.refusal"
local registry = require "gate.registry"
local relay = require "gate.relay"
local replays = require "gate.replays"
local rooms = require "gate.rooms"
local routing = require "gate.routing"

local format = string.format
local max = math.max
local min = math.min
local random = math.random
local tonumber = tonumber

local CLIENT_GONE = 499
local LOOK_EVERY_S = 0.25  -- no wait is longer: a waiter depends on nobody waking it
local LEAST_WAIT_S = 0.001
-- nginx allows ten internal redirects: the way here took one, and the way to the heartbeats, which
-- begin before the last try, is one more.
local MAX_TRIES = 9
local RETRY_MIN_S, RETRY_MAX_S = 0.01, 0.05
local UNKNOWN_MAX_WAITING = 10000
local TOO_MANY_BYTES = {
    detail = "Bodies of waiting requests take as many bytes as may be held.",
}

local _M = {}

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

-- The first snapshot may tell what the request is for.
local function find_out(var, waiter)
    local target, query, facts = routing.find(var)
    if not target then
        return nil, query, facts
    end
    local service = target.service
    rooms.move(waiter, service.name)
    activity.arrive(var, target, query)
    if activity.wait_for(var, service.name) > service.max_waiting then
        return nil, "too-many-waiting"
    end
    notifier.kick()
    return service
end

-- A newcomer that finds enough for all before it and itself need not be woken: rooms would else
-- keep each other filled under a load that needs no waiting.
local function try(var, waiter, service)
    if not waiter.granted then
        rooms.advance(waiter.name)
    end
    if not waiter.granted then
        return nil
    end
    waiter.granted = false
    return balancer.admit(var, service)
end

-- Its service was removed: whoever had been let through to it had asked for the right route.
local function without_service(var, sent)
    return (sent or var.sg_sent_to ~= "") and "upstream-failed" or "no-such-route"
end

-- One look at everything a waiter waits for: a replica, or the code (and facts) of what ends the
-- wait, or neither.
local function look(var, waiter, wish)
    local service, code, facts
    if waiter.name == rooms.UNKNOWN then
        service, code, facts = find_out(var, waiter)
        if not service then
            waiter.granted = false
            return nil, code or (refusal.too_late(var, nil, wish) and "not-ready" or nil), facts
        end
    else
        service = registry.find(waiter.name)
    end
    local allowed
    allowed, code, facts = keys.still(var, service)
    if not allowed then
        return nil, code, facts
    end
    if service and lost_twice(var) then
        return nil, "upstream-failed"
    end
    local replica
    if service then
        replica = try(var, waiter, service)
        -- Trying may have brought a newer view.
        service = registry.find(waiter.name)
    end
    if replica then
        return replica
    elseif not service then
        return nil, without_service(var, false)
    end
    code = refusal.without_waiting(var, service)
    return nil, code or (refusal.too_late(var, service, wish) and "hold-timeout" or nil)
end

local function note_waited(var, waiter)
    local before = tonumber(var.sg_waited) or 0
    var.sg_waited = format("%.3f", before + clock.now() - waiter.since)
end

local function go_on(var, waiter)
    rooms.leave(var, waiter)
    note_waited(var, waiter)
    var.sg_tries = (tonumber(var.sg_tries) or 0) + 1
    var.sg_off = ""
    inner.tell(var)
end

-- If it wants a stream, it answers from now on, and another request waits in its place.
local function begin_heartbeats(var, waiter)
    if not relay.wanted(var) then
        var.sg_streaming = "0"
        return
    elseif waiter.granted then
        return -- meanwhile it was its turn
    end
    rooms.hand_over(waiter)
    note_waited(var, waiter)
    return ngx.exec("@relay")
end

local function refuse(var, code, facts)
    inner.tell(var, code)
    return refusal.send(var, code, facts)
end

local function client_gone(var)
    -- On a connection of many requests nginx itself notices the end of each.
    return var.server_protocol ~= "HTTP/2.0" and client.gone()
end

local function wait(var, waiter)
    local wish = refusal.wish()
    while true do
        registry.refresh()
        local replica, code, facts = look(var, waiter, wish)
        if replica then
            return go_on(var, waiter)
        elseif code then
            rooms.leave(var, waiter)
            note_waited(var, waiter)
            return refuse(var, code, facts)
        end
        local heartbeat = relay.due_in(var, waiter.name)
        if heartbeat <= 0 then
            begin_heartbeats(var, waiter)
            heartbeat = LOOK_EVERY_S
        end
        local last_look = tonumber(var.sg_since) + (wish or math.huge) - clock.now()
        local woken = waiter.semaphore:wait(
            max(LEAST_WAIT_S, min(LOOK_EVERY_S, last_look, heartbeat)))
        -- nginx does not see an end behind the next request that the client has sent already.
        if not woken and client_gone(var) then
            return ngx.exit(CLIENT_GONE)
        end
    end
end

local function begin(var, service)
    local limit = service and service.max_waiting or UNKNOWN_MAX_WAITING
    if activity.begin_waiting(var, service and service.name or rooms.UNKNOWN) > limit then
        return "too-many-waiting"
    end
    return nil
end

-- The service of this name in the newest view, and the code if nobody waits for it.
local function expected(var, name)
    local service = registry.find(name)
    if not service then
        return nil, "no-such-route"
    end
    return service, refusal.without_waiting(var, service)
end

--- Send a request that cannot be routed now to the waiting room, or refuse it; the access phase of
--- the public location. `service` is nil while the route is not known. Does not return.
function _M.enter(var, service)
    local code
    var.sg_since = clock.now()
    if service then
        local name = service.name
        -- Another worker may know more since the last tick, and once the body is asked for there
        -- is no refusal before it has come.
        registry.refresh()
        service, code = expected(var, name)
        if code and notifier.confirm() then
            service, code = expected(var, name)
        end
    end
    if code then
        return refusal.send(var, code)
    end
    local cold = service and #service.routable == 0
    if (cold or service and balancer.full(service)) and refusal.wish() == 0 then
        return refusal.send(var, "hold-timeout")
    end
    code = begin(var, service)
    if code then
        return refusal.send(var, code)
    end
    if cold and not rooms.has(service.name) then
        notifier.kick()
    end
    if not bodies.read(var) then
        return refusal.send(var, "too-many-waiting", TOO_MANY_BYTES)
    end
    return ngx.exec("@hold")
end

--- Wait in the place of a request that sends comment lines; the access phase of the inner listener.
--- Does not return.
function _M.resume(var)
    if not inner.unpack(var) then
        return refusal.send(var, "bad-request")
    end
    -- Counted before nginx asks for the body: that tells the other request to give its counts back.
    activity.take_over(var)
    ngx.req.read_body()
    return ngx.exec("@hold")
end

--- Wait for a replica; the access phase of @hold. Returns when the peer is chosen.
function _M.wait(var)
    if client_gone(var) then
        return ngx.exit(CLIENT_GONE)
    end
    -- What it waited until the heartbeats began is noted already.
    local since = var.sg_waited == "" and tonumber(var.sg_since) or clock.now()
    local name = var.sg_service == "" and rooms.UNKNOWN or var.sg_service
    return wait(var, rooms.join(var, name, since))
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

-- The replay of a request that was sent is precious: it waits until it has shown whether what ended
-- its replica ends others too. Meanwhile its place in the order is kept, and its slot is free.
local function await_signs(var, service, broke)
    local limit = min(service.hold_timeout, refusal.wish() or math.huge)
    replays.note_break(service, broke)
    rooms.draw(var)
    activity.drop_replica(var)
    replays.wait(service.name, broke, tonumber(var.sg_since) + limit)
    if client_gone(var) then
        return ngx.exit(CLIENT_GONE)
    end
end

--- Decide about a request whose try failed: hold it again, or give up; the access phase of @again.
function _M.again(var)
    local since, id = clock.now(), var.sg_on
    local sent = tonumber(activity.last_of(var.upstream_bytes_sent)) or 0
    local service = registry.find(var.sg_service)
    local code = verdict(var, sent, service)
    -- Before its slot is free: nobody else shall be sent there.
    if sent == 0 then
        balancer.connect_failed(id)
    elseif code ~= "upstream-timeout" then
        balancer.broke_off(id)
    end
    if code then
        activity.drop_replica(var)
        return refuse(var, code)
    end
    if sent > 0 then
        note_sent(var, id)
    else
        activity.drop_replica(var)
        ngx.sleep(RETRY_MIN_S + random() * (RETRY_MAX_S - RETRY_MIN_S))
    end
    if var.sg_since == "" then
        var.sg_since = since
    end
    if client_gone(var) then
        return ngx.exit(CLIENT_GONE)
    end
    activity.begin_waiting(var, var.sg_service)
    notifier.kick()
    if sent > 0 then
        await_signs(var, service, since)
    end
    return wait(var, rooms.join(var, var.sg_service, since))
end

return _M
