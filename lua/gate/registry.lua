-- This worker's compiled view of the snapshot: one hash lookup from a route to its service.
-- Refreshed whenever the shared version is another; all of it is per worker.
--
-- Service and replica tables are made anew with each version, except that a replica of the same
-- generation keeps its table: load history and failure counts of this worker live in it.

local cjson = require "cjson.safe"

local clock = require "gate.clock"
local keys = require "gate.keys"
local picker = require "gate.picker"
local router = require "gate.router"
local store = require "gate.store"

local concat = table.concat
local find = string.find
local ipairs = ipairs
local md5_bin = ngx.md5_bin
local pairs = pairs
local sort = table.sort
local sub = string.sub

local REREADS = 5
local MATCHES_KEPT = 2000
local LONGEST_KEPT = 1024 -- bytes of a path

local version          -- of the compiled snapshot, nil before the first
local suspicions = -1  -- of the compiled lists
local complete = false -- false while the backend could not tell about every service
local services = {}
local by_name = {}
local by_route = {}
local by_model = {}
local models = {}      -- names, in the order of the configuration
local replicas = {}
local matches = {} -- raw path → what router.match said of it
local matches_kept = 0

local _M = {}

local function value(field)
    if field == cjson.null then
        return nil
    end
    return field
end

local function compile_replica(entry, known, service, at)
    local replica = known[entry.id]
    if not replica or replica.gen ~= entry.gen then
        replica = {
            id = entry.id, gen = entry.gen, running_since = at - (value(entry.age_s) or 0),
            count_key = store.tag() .. ":r:" .. entry.id, sum_key = ":r:" .. entry.id,
            service = service, failures = 0, answered = 0, peak = 0, last_peak = 0, period = 0,
        }
    end
    local endpoint = value(entry.endpoint)
    if endpoint ~= replica.endpoint then
        replica.endpoint = endpoint
        if endpoint and endpoint:sub(1, 5) == "unix:" then
            replica.host, replica.port = endpoint, nil
        elseif endpoint then
            local host, port = endpoint:match("^(.*):(%d+)$")
            replica.host, replica.port = host, tonumber(port)
        end
    end
    replica.phase = entry.phase
    replica.key = value(entry.key) -- it wants to be shown this
    replica.usable = entry.routable == true and endpoint ~= nil
    replica.service = service
    replica.capacity = service.max_in_flight
    return replica
end

-- The nginx variable with a request's header of that name, or nil without one.
local function header_variable(name)
    return name and "http_" .. name:lower():gsub("%-", "_") or nil
end

-- The ring of a service whose requests stay with a replica; the one before, while it has the same
-- replicas.
local function compile_ring(service, before)
    local ids = {}
    for i, replica in ipairs(service.replicas) do
        ids[i] = replica.id
    end
    sort(ids)
    local members = concat(ids, " ")
    if before and before.members == members then
        return before
    end
    local ring = picker.ring(ids, md5_bin)
    ring.members = members
    return ring
end

local function compile_service(entry, known, at, of_version, before)
    local service = {
        name = entry.name, route = entry.route_name, retired = entry.retired == true,
        version = of_version, -- of the snapshot its lists are of
        told_at = at, -- the moment its estimates are of
        api_prefixes = router.prefixes(entry.api_paths),
        no_wake = router.prefixes(value(entry.no_wake) or {}),
        state = entry.state, reason = value(entry.reason),
        retry_after_s = value(entry.retry_after_s), hold_timeout = entry.hold_timeout,
        max_waiting = entry.max_waiting, replay = entry.replay,
        read_timeout = entry.read_timeout, health = entry.health,
        max_in_flight = value(entry.max_in_flight) or 0, -- per replica; 0: no bound
        affinity = header_variable(value(entry.affinity)),
        prefix_affinity = entry.prefix_affinity == true,
        models = value(entry.models) or {}, upstream_model = value(entry.upstream_model),
        public = entry.public == true,
        heartbeat = value(entry.heartbeat) or 0, progress = value(entry.progress),
        max_idle_connection = value(entry.max_idle_connection) or 0,
        cors = value(entry.cors), -- nil: the gate's
        use_key = store.tag() .. ":u:" .. entry.name, requests_key = "requests:" .. entry.name,
        busy_key = "busy:" .. entry.name, broke_key = "broke:" .. entry.name,
        replicas = {}, routable = {}, targets = {}, targets_kept = 0,
    }
    local refusal = value(entry.refusal)
    if refusal then
        service.refusal = {
            code = refusal.code, reason = value(refusal.reason), log = value(refusal.log),
            retry_after_s = value(refusal.retry_after_s),
        }
    end
    for i, replica in ipairs(entry.replicas) do
        service.replicas[i] = compile_replica(replica, known, service, at)
    end
    if service.affinity or service.prefix_affinity then
        service.ring = compile_ring(service, before and before.ring)
    end
    return service
end

local function list_routable()
    suspicions = store.suspicions()
    for _, service in ipairs(services) do
        local routable = {}
        for _, replica in ipairs(service.replicas) do
            replica.suspect = store.suspected(replica.id, replica.gen) ~= nil
            if replica.usable and not replica.suspect then
                routable[#routable + 1] = replica
            end
        end
        service.routable = routable
    end
end

local function offer_models(service)
    for _, name in ipairs(service.models) do
        by_model[name] = service
        models[#models + 1] = name
    end
end

local function compile(new_version, snapshot, at)
    local known, known_services = replicas, by_name
    services, by_name, by_route, replicas, complete = {}, {}, {}, {}, true
    by_model, models = {}, {}
    for _, entry in ipairs(snapshot.services) do
        if entry.unknown == true and not entry.route_name then
            complete = false
        else
            local service = compile_service(
                entry, known, at, new_version, known_services[entry.name])
            services[#services + 1] = service
            by_name[service.name] = service
            if not service.retired then
                by_route[service.route] = service
                offer_models(service)
            end
            for _, replica in ipairs(service.replicas) do
                replicas[replica.id] = replica
            end
        end
    end
    version = new_version
    matches, matches_kept = {}, 0
    list_routable()
end

--- Take over the newest snapshot and suspicions; true if anything changed.
function _M.refresh()
    local stored = store.version()
    if stored == version then
        if version and suspicions ~= store.suspicions() then
            list_routable()
            return true
        end
        return false
    end
    -- Whoever sees a new service also knows who may use it.
    keys.refresh()
    for _ = 1, REREADS do
        local text, at = store.snapshot(stored)
        if text then
            local snapshot, err = cjson.decode(text)
            if not snapshot then
                ngx.log(ngx.CRIT, "snapshot ", stored, ": ", err)
                return false
            end
            compile(stored, snapshot, at or clock.now())
            return true
        end
        stored = store.version()
    end
    return false
end

--- Take over the newest suspicions alone.
function _M.refresh_suspicions()
    if suspicions ~= store.suspicions() then
        list_routable()
    end
end

--- Version of this view, nil before the first snapshot.
function _M.version()
    return version
end

--- Whether an unknown route is really unknown: there is a snapshot, and no service is missing in
--- it.
function _M.complete()
    return complete
end

--- Match a raw request URI. Returns what router.match says of its path (and `printable`, the path
--- for the log, if it is not), and the query with its question mark, or nil. Clients ask for few
--- paths many times, so answers are kept.
function _M.match(uri)
    local mark = find(uri, "?", 1, true)
    local path = mark and sub(uri, 1, mark - 1) or uri
    local target = matches[path]
    if not target then
        target = router.match(by_route, path)
        target.printable = router.printable(path)
        if #path > LONGEST_KEPT then
            return target, mark and sub(uri, mark)
        elseif matches_kept >= MATCHES_KEPT then
            matches, matches_kept = {}, 0
        end
        matches[path] = target
        matches_kept = matches_kept + 1
    end
    return target, mark and sub(uri, mark)
end

--- All services, retired ones too.
function _M.services()
    return services
end

--- A service by name, if requests may go to it.
function _M.find(name)
    local service = by_name[name]
    if service and not service.retired then
        return service
    end
    return nil
end

--- The service that offers a model, or nil.
function _M.by_model(name)
    return by_model[name]
end

--- Names of all models that services offer.
function _M.models()
    return models
end

--- What a raw path is of a service found otherwise than by it; answers are kept, as by `match`.
function _M.target(service, path)
    local target = service.targets[path]
    if not target then
        target = router.target(service, path)
        if #path > LONGEST_KEPT then
            return target
        elseif service.targets_kept >= MATCHES_KEPT then
            service.targets, service.targets_kept = {}, 0
        end
        service.targets[path] = target
        service.targets_kept = service.targets_kept + 1
    end
    return target
end

--- A replica by id, or nil.
function _M.replica(id)
    return replicas[id]
end

--- All replicas by id.
function _M.replicas()
    return replicas
end

--- Whether a replica that once took requests will take none any more.
function _M.ended(id)
    local replica = replicas[id]
    if not replica then
        return true
    end
    return not replica.usable and replica.phase ~= "starting" and replica.phase ~= "ready"
end

--- Services of the stored snapshot as they came, by name: what to keep of one the backend is unsure
--- of.
function _M.stored_entries()
    local text = version and store.snapshot(version)
    local snapshot = text and cjson.decode(text)
    local entries = {}
    for _, entry in pairs(snapshot and snapshot.services or {}) do
        entries[entry.name] = entry
    end
    return entries
end

return _M
