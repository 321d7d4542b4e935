-- Counts of requests, in flight, last use. What a request holds is noted in nginx variables,
-- because those survive named locations; what access acquires, log releases, once.
--
-- Shared (through the store), each under this worker's tag: uses and waiting requests of a service,
-- requests on a replica, bytes of held bodies. Running totals of requests have no tag. What
-- requests hold on clients' keys is the business of keys.lua, and given back together with these.
-- Per worker: ends of uses and answers not yet flushed, number of counts this worker holds, the
-- replicas its requests are or were on.
--
-- nginx variables: sg_service, sg_use (1 while counted as use), sg_on (replica while counted
-- there), sg_off (replica of a try that failed), sg_waits_for (service, or rooms.UNKNOWN before,
-- while counted as waiting), sg_bytes (reserved for the body), sg_refused (service of a request the
-- gate itself answered: then sg_service is empty).

local clock = require "gate.clock"
local flows = require "gate.flows"
local keys = require "gate.keys"
local registry = require "gate.registry"
local store = require "gate.store"

local ipairs = ipairs
local pairs = pairs
local tonumber = tonumber

local FLUSH_S = 0.02
local ANSWER_TTL = 3600
local LAST_WORDS_S = 0.1
local LOOK_S = 0.2      -- how often long answers are looked at

local ends = {}     -- service → end of its last use
local flushed = {}  -- service → newest end in the shared dict
local answers = {}  -- replica → time of its last answer
local touched = {}  -- replica id → its table, until no request is on it and it is gone
local holding = 0   -- counts held by requests of this worker
local began = 0     -- requests begun by this worker
local looked = 0    -- when long answers were last looked at

local _M = {}

local function key(kind, name)
    return store.tag() .. kind .. name
end

--- Note which service a request is for, and what it is asked. Requests that neither wake the
--- service nor keep it (OPTIONS, paths under no_wake) are not counted as a use.
function _M.arrive(var, target, query)
    local service = target.service
    var.sg_service = service.name
    var.sg_uri = query and target.path .. query or target.path
    if target.passive or var.request_method == "OPTIONS" then
        var.sg_passive = "1"
        return
    end
    store.count(service.use_key, 1)
    var.sg_use = "1"
    holding = holding + 1
    began = began + 1
    store.count(service.requests_key, 1)
end

--- Count a request on a replica; returns the number this worker now has there. Whoever calls this
--- compares the version afterwards: only then is a drained replica's zero final.
function _M.take_replica(var, replica)
    local id = replica.id
    local n = store.count(replica.count_key, 1)
    var.sg_on = id
    touched[id] = replica
    holding = holding + 1
    return n
end

--- Give the replica's count back; returns its id, nil if the request was on none.
function _M.drop_replica(var)
    local id = var.sg_on
    if not id or id == "" then
        return nil
    end
    local replica = touched[id]
    store.count(replica.count_key, -1)
    if replica.key then
        keys.take_back(var)
    end
    flows.finish()
    holding = holding - 1
    var.sg_on = ""
    var.sg_off = id
    return id
end

--- The replica a request is on.
function _M.replica(var)
    return touched[var.sg_on]
end

--- Count a request that waits; returns the number waiting for the service in all workers.
function _M.begin_waiting(var, name)
    store.count(key(":w:", name), 1)
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

local function leave_queue(var)
    local name = var.sg_waits_for
    if name and name ~= "" then
        store.count(key(":w:", name), -1)
        var.sg_waits_for = ""
        holding = holding - 1
    end
end

--- It waits no longer: its place and the bytes reserved for its body are free.
function _M.end_waiting(var)
    local bytes = tonumber(var.sg_bytes)
    leave_queue(var)
    if bytes then
        store.count(key(":b", ""), -bytes)
        var.sg_bytes = ""
    end
end

--- Count a request that goes on with the wait and the use of another, which then hands them over.
function _M.take_over(var)
    store.count(key(":u:", var.sg_service), 1)
    var.sg_use = "1"
    holding = holding + 1
    _M.begin_waiting(var, var.sg_service)
end

--- Another request was counted in its place. It keeps the bytes that are reserved for its body.
function _M.hand_over(var)
    leave_queue(var)
    if var.sg_use == "1" then
        store.count(key(":u:", var.sg_service), -1)
        var.sg_use = ""
        holding = holding - 1
    end
end

--- Reserve bytes for the body of a request that waits; a second call corrects the first.
--- Returns the bytes reserved in all workers.
function _M.reserve(var, bytes)
    store.count(key(":b", ""), bytes - (tonumber(var.sg_bytes) or 0))
    var.sg_bytes = bytes
    return store.sum(store.workers(), ":b")
end

--- Bytes reserved in all workers.
function _M.reserved()
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
    holding = holding - 1
end

--- nginx lists a value for each try, divided by commas and colons: the last one.
function _M.last_of(list)
    return list and list:match("([^,:%s]+)%s*$")
end

-- Whether a suspected replica has begun to answer this request since it is suspected. The end of a
-- request says nothing: what was under way when a replica died ends just then, and a last header it
-- wrote is read a moment later.
local function disproves(var, suspected, now)
    local header = tonumber(_M.last_of(var.upstream_header_time))
    local whole = tonumber(_M.last_of(var.upstream_response_time))
    return header ~= nil and whole ~= nil and now - (whole - header) > suspected + LAST_WORDS_S
end

local function note_answer(var, replica)
    local now = clock.now()
    local suspected = replica.suspect and store.suspected(replica.id, replica.gen)
    if suspected and not disproves(var, suspected, now) then
        return
    end
    replica.failures = 0
    replica.answered = now
    answers[replica.id] = now
    if replica.suspect then
        replica.suspect = false
        store.trust(replica.id, replica.gen)
    end
end

--- Give back all a request still holds, and note that its replica answered; the log phase.
--- Returns the service's name.
function _M.release(var, answered)
    local name = var.sg_service
    if name == "" then
        name = var.sg_refused
    end
    local id = var.sg_on
    if id ~= "" then
        local replica = touched[id]
        if answered then
            note_answer(var, replica)
        end
        store.count(replica.count_key, -1)
        holding = holding - 1
    else
        -- Without a replica it may have ended while it waited.
        _M.end_waiting(var)
    end
    if var.sg_use == "1" then
        end_use(name, clock.now())
    end
    keys.release(var)
    return name
end

--- Leave the request at an address of `flows` out of the counts, as if it had ended: its client has
--- been silent for long. What it holds stands in its variables, so that its log phase gives back
--- nothing twice.
function _M.park(at, replica)
    local use = flows.read(at, "sg_use") == "1"
    flows.park(at, use)
    flows.write(at, "sg_on", "")
    flows.write(at, "sg_off", replica.id)
    store.count(replica.count_key, -1)
    holding = holding - 1
    if use then
        flows.write(at, "sg_use", "")
        end_use(replica.service.name, clock.now())
    end
end

--- Its client was heard of again: it counts as before.
function _M.unpark(at, replica)
    local use = flows.parked(at)
    flows.park(at, nil)
    if use then
        store.count(key(":u:", replica.service.name), 1)
        flows.write(at, "sg_use", "1")
        holding = holding + 1
    end
    store.count(replica.count_key, 1)
    holding = holding + 1
    touched[replica.id] = replica
    flows.write(at, "sg_off", "")
    flows.write(at, "sg_on", replica.id)
end

--- Give back all at once of a request the gate answers itself: its log phase may be long in coming,
--- while the rest of its body is thrown away.
function _M.abandon(var)
    _M.drop_replica(var)
    _M.end_waiting(var)
    if var.sg_use == "1" then
        end_use(var.sg_service, clock.now())
        var.sg_use = ""
    end
    keys.release(var)
end

-- Bytes of a long answer count as an answer, but lift no suspicion: what a replica wrote before it
-- died may take a while to pass.
local function note_flows(now)
    flows.look(function(replica)
        return now - replica.answered < LOOK_S
    end, function(replica)
        replica.answered = now
        answers[replica.id] = now
    end)
end

--- Write what this worker noted since the last flush where all see it; called by the tick.
function _M.flush()
    local now = clock.now()
    if now - looked >= LOOK_S then
        looked = now
        note_flows(now)
    end
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
    for id, replica in pairs(touched) do
        if not registry.replica(id) and store.drop_zero(replica.count_key) then
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

--- Changes with whatever of the requests the backend's pages show: begun, waiting, in flight.
function _M.mark()
    local tags = store.workers()
    local requests, waiting, uses = 0, 0, 0
    for _, service in ipairs(registry.services()) do
        local asked = store.counted(service.requests_key)
        if asked > 0 then
            requests = requests + asked
            waiting = waiting + store.sum(tags, ":w:" .. service.name)
            uses = uses + store.sum(tags, ":u:" .. service.name)
        end
    end
    return requests .. "," .. waiting .. "," .. uses
end

return _M
