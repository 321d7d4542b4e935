-- Counts of requests, in flight, last use. What a request holds is noted in nginx variables, because
-- those survive named locations; what access acquires, log releases, once.
--
-- Shared (through the store), each under this worker's tag: uses and waiting requests of a service,
-- requests on a replica, bytes of held bodies. Running totals of requests have no tag.
-- Per worker: ends of uses and answers not yet flushed, number of counts this worker holds.

local bit = require "bit"

local clock = require "gate.clock"
local registry = require "gate.registry"
local router = require "gate.router"
local store = require "gate.store"

local band = bit.band
local bor = bit.bor
local pairs = pairs
local tonumber = tonumber

local USE, REPLICA, WAITING, BYTES = 1, 2, 4, 8
local FLUSH_S = 0.02
local ANSWER_TTL = 3600

local ends = {}     -- service → end of its last use
local flushed = {}  -- service → newest end in the shared dict
local answers = {}  -- replica → time of its last answer
local touched = {}  -- replica → count key that may have to be removed
local holding = 0   -- counts held by requests of this worker
local began = 0     -- requests begun by this worker

local _M = {}

local function flags(var)
    return tonumber(var.sg_held) or 0
end

local function key(kind, name)
    return store.tag() .. kind .. name
end

--- Count a request that is a use of its service: the service is not idle until it has ended.
function _M.begin_use(var, service)
    store.count(service.use_key, 1)
    var.sg_held = USE
    holding = holding + 1
    began = began + 1
    store.count(service.requests_key, 1)
end

--- Note which service a request is for, and what it is asked. Requests that neither wake the service
--- nor keep it (OPTIONS, paths under no_wake) are not counted as a use.
function _M.arrive(var, service, ask, path)
    var.sg_service = service.name
    var.sg_uri = ask
    if var.request_method == "OPTIONS" or router.under(service.no_wake, path) then
        var.sg_passive = "1"
    else
        _M.begin_use(var, service)
    end
end

--- Count a request on a replica; returns the number this worker now has there. Whoever calls this
--- compares the version afterwards: only then is a drained replica's zero final.
function _M.take_replica(var, replica)
    local n = store.count(replica.count_key, 1)
    var.sg_held = bor(flags(var), REPLICA)
    var.sg_replica = replica.id
    touched[replica.id] = replica.count_key
    holding = holding + 1
    return n
end

--- Give the replica's count back.
function _M.drop_replica(var)
    local held = flags(var)
    if band(held, REPLICA) ~= 0 then
        store.count(key(":r:", var.sg_replica), -1)
        var.sg_held = held - REPLICA
        holding = holding - 1
    end
end

--- Count a request that waits; returns the number waiting for the service in all workers.
function _M.begin_waiting(var, name)
    store.count(key(":w:", name), 1)
    var.sg_held = bor(flags(var), WAITING)
    var.sg_waits_for = name
    holding = holding + 1
    return store.sum(store.workers(), ":w:" .. name)
end

--- It waits for a service now whose route was not known before; returns the number waiting for it.
function _M.wait_for(var, name)
    store.count(key(":w:", var.sg_waits_for), -1)
    var.sg_waits_for = name
    store.count(key(":w:", name), 1)
    return store.sum(store.workers(), ":w:" .. name)
end

--- It waits no longer: its place and the bytes reserved for its body are free.
function _M.end_waiting(var)
    local held = flags(var)
    if band(held, WAITING) ~= 0 then
        store.count(key(":w:", var.sg_waits_for), -1)
        holding = holding - 1
        held = held - WAITING
    end
    if band(held, BYTES) ~= 0 then
        store.count(key(":b", ""), -tonumber(var.sg_bytes))
        holding = holding - 1
        held = held - BYTES
    end
    var.sg_held = held
end

--- Reserve bytes for the body of a request that will wait; a second call corrects the first.
--- Returns the bytes reserved in all workers.
function _M.reserve(var, bytes)
    local held = flags(var)
    local before = band(held, BYTES) ~= 0 and tonumber(var.sg_bytes) or 0
    store.count(key(":b", ""), bytes - before)
    var.sg_bytes = bytes
    if band(held, BYTES) == 0 then
        var.sg_held = held + BYTES
        holding = holding + 1
    end
    return store.sum(store.workers(), ":b")
end

local function end_use(name, now)
    ends[name] = now
    -- The end is told before the count goes: nobody may see "none in flight, idle for long" of a
    -- service that is just done. More than one write per flush interval would only cost time.
    if now - (flushed[name] or 0) > FLUSH_S then
        flushed[name] = now
        store.advance_time("end:" .. name, now)
    end
    store.count(key(":u:", name), -1)
end

--- Give back all a request still holds; called by the log phase. `answered`: the service answered it.
function _M.release(var, answered)
    local held = flags(var)
    if held == 0 then
        return
    end
    if held >= WAITING then
        _M.end_waiting(var)
    end
    local now = clock.now()
    if band(held, REPLICA) ~= 0 then
        local id = var.sg_replica
        local replica = registry.replica(id)
        if answered and replica then
            replica.failures = 0
            replica.answered = now
            answers[id] = now
        end
        store.count(replica and replica.count_key or key(":r:", id), -1)
        holding = holding - 1
    end
    if band(held, USE) ~= 0 then
        end_use(var.sg_service, now)
        holding = holding - 1
    end
    var.sg_held = 0
end

--- Write what this worker noted since the last flush where all see it; called by the tick.
function _M.flush()
    for name, at in pairs(ends) do
        flushed[name] = at
        store.advance_time("end:" .. name, at)
        ends[name] = nil
    end
    for id, at in pairs(answers) do
        store.advance_time("answered:" .. id, at, ANSWER_TTL)
        answers[id] = nil
    end
end

--- Remove this worker's zero counts of replicas that are gone; called by the tick now and then.
function _M.sweep()
    for id, count_key in pairs(touched) do
        if not registry.replica(id) and store.drop_zero(count_key) then
            touched[id] = nil
        end
    end
end

--- Counts held by this worker's requests: zero means that none of them is under way.
function _M.holding()
    return holding
end

--- Requests this worker has begun to count since it started.
function _M.began()
    return began
end

--- Requests of all workers on a replica.
function _M.on_replica(tags, replica)
    return store.sum(tags, replica.sum_key)
end

--- What there is to tell about a service, or nil if it was never asked for.
function _M.report(tags, name, now)
    local requests = store.counted("requests:" .. name)
    local waiting = store.sum(tags, ":w:" .. name)
    local uses = store.sum(tags, ":u:" .. name)
    local last_end = store.time("end:" .. name)
    local wanted = store.time("wanted:" .. name)
    if requests == 0 and waiting == 0 and uses == 0 and not wanted then
        return nil
    end
    local lease_end = wanted and store.time("lease:" .. name)
    return {
        requests = requests, waiting = waiting,
        in_flight = uses > waiting and uses - waiting or 0,
        idle_s = last_end and now - last_end,
        wanted_s = wanted and now - wanted,
        lease_s = lease_end and (lease_end > now and lease_end - now or 0),
    }
end

return _M
