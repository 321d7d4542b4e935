-- Choose a replica for a request and set it as nginx's peer. Release is paced: load on a replica
-- grows by at most GROWTH requests per WINDOW_S above its highest of the last ten seconds, because
-- a tunnel's listener loses connections that come in a burst.
--
-- Per worker, in the replica's table: peaks of this worker's load in the current and the last
-- period. Shared: how much of the window's growth all workers have used.

local ngx_balancer = require "ngx.balancer"

local activity = require "gate.activity"
local clock = require "gate.clock"
local flows = require "gate.flows"
local keys = require "gate.keys"
local picker = require "gate.picker"
local registry = require "gate.registry"
local store = require "gate.store"

local crc32_long = ngx.crc32_long
local floor = math.floor
local ipairs = ipairs
local max = math.max
local min = math.min
local random = math.random
local tonumber = tonumber

local GROWTH = 16
local WINDOW_S = 0.005
local PERIOD_S = 5
local CONNECT_TIMEOUT_S = 5
local TRIES = 8
local SUSPECT_AFTER_ALONE = 3
local SUSPECT_TTL_S = 600
local TURNS = 2 ^ 24

local _M = {}

-- Where on the ring a request belongs: by a header, or by how its prompt begins.
local function place_of(var, service)
    if service.prefix_affinity then
        return tonumber(var.sg_place)
    end
    local key = service.affinity and var[service.affinity]
    return key and key ~= "" and crc32_long(key)
end

local function pick_among(var, service)
    -- What another worker suspects is out of the choice at once, not only with the next tick.
    registry.refresh_suspicions()
    local routable = service.routable
    local tags, loads = store.workers(), {}
    for i = 1, #routable do
        loads[routable[i].id] = activity.on_replica(tags, routable[i])
    end
    local place = place_of(var, service)
    local stays = place and picker.affine(service.ring, place, routable, loads)
    if stays then
        return stays
    end
    -- Numbers in order could leave one of several equals out for ever: whichever ended a moment ago
    -- is no equal yet, so who is one follows from what was chosen before.
    return picker.least(routable, loads, random(0, TURNS))
end

-- One replica alone costs nothing but this.
local function pick(var, service)
    local routable = service.routable
    if #routable < 2 then
        return routable[1]
    end
    return pick_among(var, service)
end

local function roll_period(replica, now)
    local period = floor(now / PERIOD_S)
    if period ~= replica.period then
        replica.last_peak = period == replica.period + 1 and replica.peak or 0
        replica.peak = 0
        replica.period = period
    end
end

local function within_pace(replica, n)
    local now = clock.now()
    roll_period(replica, now)
    if n > replica.peak and n > replica.last_peak
        and store.grow(replica.id, now, WINDOW_S) > GROWTH then
        return false
    end
    if n > replica.peak then
        replica.peak = n
    end
    return true
end

-- Slots of a replica that are free; negative for a moment while too many try.
local function free_slots(service, tags, replica)
    return service.max_in_flight - activity.on_replica(tags, replica)
end

-- Counted before it is compared: of those who try for the last slot at once none may get it, but
-- never two.
local function within_bound(service, replica)
    return service.max_in_flight == 0 or free_slots(service, store.workers(), replica) >= 0
end

--- Admit a request to a replica of its service, and count it there. Returns the replica; or nil and
--- "none" (nothing to route to), "full" (every slot taken), "paced" (not yet) or "gone" (the
--- service is no more).
function _M.admit(var, service)
    for _ = 1, TRIES do
        local replica = pick(var, service)
        if replica then
            local n = activity.take_replica(var, replica)
            -- Counted first, version read second: with that order "version n, replica at zero"
            -- proves to the backend that nobody can still reach the replica. It is the version of
            -- the list that was chosen from: a request may have been read for long since.
            if store.version() == service.version then
                local full = not within_bound(service, replica)
                if not full and within_pace(replica, n) then
                    if replica.key then
                        keys.lend(var, replica.key)
                    end
                    return replica
                end
                activity.drop_replica(var)
                return nil, full and "full" or "paced"
            end
            activity.drop_replica(var)
        end
        if not registry.refresh() and not replica then
            return nil, "none"
        end
        service = registry.find(service.name)
        if not service then
            return nil, "gone"
        end
    end
    return nil, "paced"
end

local function pace_left(replica, now)
    roll_period(replica, now)
    local below_peak = max(replica.peak, replica.last_peak) - store.counted(replica.count_key)
    local growth = GROWTH - store.grown(replica.id, now, WINDOW_S)
    return max(0, below_peak) + max(0, growth)
end

--- How many requests this worker may send to a service just now; an estimate, it reserves nothing.
function _M.capacity(service)
    local bounded = service.max_in_flight > 0
    local tags = bounded and store.workers()
    local total, now = 0, clock.now()
    for _, replica in ipairs(service.routable) do
        local left = pace_left(replica, now)
        if bounded then
            left = max(0, min(left, free_slots(service, tags, replica)))
        end
        total = total + left
    end
    return total
end

--- Whether every slot of a service that has replicas to route to is taken.
function _M.full(service)
    local routable = service.routable
    if service.max_in_flight == 0 or #routable == 0 then
        return false
    end
    local tags = store.workers()
    for i = 1, #routable do
        if free_slots(service, tags, routable[i]) > 0 then
            return false
        end
    end
    return true
end

local function suspect(replica)
    replica.failures = 0
    store.suspect(replica.id, replica.gen, clock.now(), SUSPECT_TTL_S)
end

local function alone(replica)
    for _, other in ipairs(replica.service.routable) do
        if other ~= replica then
            return false
        end
    end
    return true
end

--- Nothing could be sent to a replica: it is out of the choice until a poll that starts later
--- passes. If nothing else can be chosen, only a row of such failures does that: a burst overflows
--- the backlog of a tunnel's socket, and to hold every request for a poll would be worse than to
--- try those few again.
function _M.connect_failed(id)
    local replica = registry.replica(id)
    if replica then
        replica.failures = replica.failures + 1
        if replica.failures >= SUSPECT_AFTER_ALONE or not alone(replica) then
            suspect(replica)
        end
    end
end

--- A replica broke off with a request it had. That is how the death of a process begins, whose
--- other connections may live a moment longer: nothing goes there until it has answered again.
function _M.broke_off(id)
    local replica = registry.replica(id)
    if replica then
        suspect(replica)
    end
end

--- Set the peer; the balancer phase, which cannot yield.
function _M.set_peer()
    local peer = activity.replica(ngx.var)
    -- Here and not in `admit`: the access phase just fits into one trace of the JIT compiler.
    if peer.service.max_idle_connection > 0 then
        flows.begin_at(peer, clock.now())
    else
        flows.begin(peer)
    end
    local read_timeout = peer.service.read_timeout
    local ok, err = ngx_balancer.set_current_peer(peer.host, peer.port)
    if ok then
        ok, err = ngx_balancer.set_timeouts(CONNECT_TIMEOUT_S, read_timeout, read_timeout)
    end
    if not ok then
        ngx.log(ngx.ERR, "set_current_peer ", peer.endpoint, ": ", err)
        return ngx.exit(ngx.HTTP_INTERNAL_SERVER_ERROR)
    end
end

return _M
