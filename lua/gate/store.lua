-- The only module that touches ngx.shared, so the only place to look for state of all workers.
--
-- sg_counts  numbers of requests, keyed by worker; a dict of its own, because an evicted count
--            would come back as a negative one
-- sg_state   the snapshot and its version, the workers' slots, what they show of their waiting
--            rooms, health, demand, leases. The snapshot is read once by each worker: what nobody
--            reads is the first to be evicted, and holds up the removal of all that expires after
--            it, so nothing that is made anew all the time may be kept here
-- sg_keys    the list of clients' keys; a dict of its own: an evicted list would open the gate
-- sg_rates   requests of each key in each second of the last minute, growth of each replica's load
--            in each window: only what expires
-- sg_pages   half-second copies of the backend's pages, and how often each was fetched
--
-- A worker is known by its tag "pid.start time", so a recycled pid is never taken for a dead
-- worker. Per worker: this worker's tag. Everything else is shared.

local ffi = require "ffi"

local C = ffi.C
local shared = ngx.shared
local floor = math.floor
local format = string.format
local io_open = io.open
local tonumber = tonumber

local ESRCH = 3
local LOCK_TRIES = 2000
local SLOT_LIMIT = 4096

local counts = shared.sg_counts
local state = shared.sg_state
local keys = shared.sg_keys
local rates = shared.sg_rates
local pages = shared.sg_pages
local my_tag

ffi.cdef [[
int kill(int pid, int signal);
]]

local _M = {}

-- Workers ------------------------------------------------------------------------------------

local function start_time(pid)
    local file = io_open("/proc/" .. pid .. "/stat", "r")
    if not file then
        return nil
    end
    local text = file:read("*a")
    file:close()
    -- The command name may hold blanks and brackets: count fields from the last bracket on.
    local fields = text and text:match("^.*%)%s(.*)$")
    if not fields then
        return nil
    end
    local process_state = fields:sub(1, 1)
    local index = 2
    for value in fields:gmatch("%S+") do
        index = index + 1
        if index == 22 then
            return value, process_state
        end
    end
    return nil
end

local function alive(tag)
    local pid, started = tag:match("^(%d+)%.(%d+)$")
    if C.kill(tonumber(pid), 0) ~= 0 and ffi.errno() == ESRCH then
        return false
    end
    local now_started, process_state = start_time(pid)
    -- An unreadable file says nothing about the process: then it counts as alive.
    return now_started == nil or (now_started == started and process_state ~= "Z")
end

local function lock()
    for _ = 1, LOCK_TRIES do
        if state:add("lock", my_tag) then
            return true
        end
        local owner = state:get("lock")
        -- Whoever adds the second key alone removes the dead owner's lock: two thieves would
        -- otherwise remove each other's.
        if owner and not alive(owner) and state:add("lock:" .. owner, my_tag) then
            if state:get("lock") == owner then
                state:delete("lock")
            end
        end
    end
    return nil, "lock: held by another worker"
end

--- Take the first free slot for this worker. The counts are visible to all from here on.
function _M.join()
    local pid = ngx.worker.pid()
    my_tag = pid .. "." .. (start_time(pid) or "0")
    for slot = 1, SLOT_LIMIT do
        if state:add("worker:" .. slot, my_tag) then
            while (state:get("slots") or 0) < slot do
                state:incr("slots", 1, 0)
            end
            return true
        end
    end
    return nil, "join: no free worker slot"
end

--- This worker's name among all workers since the gate's boot.
function _M.tag()
    return my_tag
end

--- Tags of all workers that have a slot; read afresh, because a count missed is a request cut.
function _M.workers()
    local tags, n = {}, 0
    for slot = 1, state:get("slots") or 0 do
        local tag = state:get("worker:" .. slot)
        if tag then
            n = n + 1
            tags[n] = tag
        end
    end
    return tags
end

-- Of several who find the same worker dead only one may free its slot: a new worker may have taken
-- it since, and would never be counted.
local function free_slot(slot, tag)
    if not lock() then
        return -- the next one who looks does it
    end
    if state:get("worker:" .. slot) == tag then
        state:delete("worker:" .. slot)
    end
    state:delete("lock")
end

--- Forget the counts of workers that died without log phases, and free their slots.
function _M.reap()
    for slot = 1, state:get("slots") or 0 do
        local tag = state:get("worker:" .. slot)
        if tag and not alive(tag) then
            local prefix = tag .. ":"
            for _, key in ipairs(counts:get_keys(0)) do
                if key:sub(1, #prefix) == prefix then
                    counts:delete(key)
                end
            end
            free_slot(slot, tag)
            ngx.log(ngx.NOTICE, "counts of dead worker ", tag, " removed")
        end
    end
end

-- Counts -------------------------------------------------------------------------------------

--- Add to a count of this worker; returns the new value.
function _M.count(key, delta)
    local value, err = counts:incr(key, delta, 0)
    if not value then
        ngx.log(ngx.CRIT, "count ", key, ": ", err)
        return 0
    end
    return value
end

--- One count as it stands.
function _M.counted(key)
    return counts:get(key) or 0
end

--- Sum of one count over the given workers; `suffix` is the key without the tag.
function _M.sum(tags, suffix)
    local total = 0
    for i = 1, #tags do
        total = total + (counts:get(tags[i] .. suffix) or 0)
    end
    return total
end

--- Remove a count of this worker if it is zero.
function _M.drop_zero(key)
    local value = counts:get(key)
    if value == 0 then
        counts:delete(key)
    end
    return value == 0 or value == nil
end

-- Waiting rooms ------------------------------------------------------------------------------

--- The next ticket; with the counts, because one that came back would be given out twice.
function _M.ticket()
    return _M.count("tickets", 1)
end

--- Show the other workers who waits for a service in this one, and all newcomers that somebody
--- does; for so many seconds, or nil for nobody.
function _M.show_queue(service, text, seconds)
    local key = my_tag .. ":q:" .. service
    if not text then
        state:delete(key)
        return
    end
    state:set(key, text, seconds)
    state:set("busy:" .. service, true, seconds)
end

--- What a worker shows of who waits for a service there, or nil.
function _M.shown_queue(tag, service)
    return state:get(tag .. ":q:" .. service)
end

--- Nobody waits for a service any more.
function _M.nobody_waits(service)
    state:delete("busy:" .. service)
end

--- Whether anybody waits, by the key "busy:" and the service's name.
function _M.somebody_waits(busy_key)
    return state:get(busy_key) ~= nil
end

-- Snapshot -----------------------------------------------------------------------------------

--- Make the gate's boot id on first start; a reload keeps it.
function _M.boot()
    local file = io_open("/dev/urandom", "rb")
    local bytes = file and file:read(8) or tostring(ngx.now()) .. ngx.worker.pid()
    if file then
        file:close()
    end
    state:add("boot", (bytes:gsub(".", function(char)
        return format("%02x", char:byte())
    end)))
end

--- The gate's boot id.
function _M.boot_id()
    return state:get("boot")
end

--- Version of the newest snapshot, "epoch:n"; nil before the first.
function _M.version()
    return state:get("version")
end

--- The snapshot of a version: its JSON text and when it came; nil once it was replaced.
function _M.snapshot(version)
    local blob = state:get("snap:" .. version)
    if not blob then
        return nil
    end
    local line_end = blob:find("\n", 1, true)
    return blob:sub(line_end + 1), tonumber(blob:sub(1, line_end - 1))
end

--- Epoch and n of a version.
function _M.parse_version(version)
    local epoch, n = version:match("^(.*):(%d+)$")
    return epoch, tonumber(n)
end

local function newer(version, old)
    if not old then
        return true
    end
    local epoch, n = _M.parse_version(version)
    local old_epoch, old_n = _M.parse_version(old)
    return epoch > old_epoch or (epoch == old_epoch and n > old_n)
end

-- Whether a snapshot takes the place of the stored one. Of one whose text was evicted the version
-- is left, and workers that have it compiled; new workers must get it again.
local function replaces(version, old, basis)
    if old and not state:get("snap:" .. old) then
        return version == old or newer(version, old)
    end
    return old == basis and newer(version, old)
end

--- Store a snapshot made from `basis` (the version seen before). A late answer never wins: it must
--- be newer than what is stored, and the stored one must still be the basis. Returns true, false if
--- it was overtaken, or nil and why it cannot be stored.
function _M.put_snapshot(basis, version, text, now)
    local ok, err = lock()
    if not ok then
        return nil, err
    end
    local old = state:get("version")
    if not replaces(version, old, basis) then
        state:delete("lock")
        return false
    end
    ok, err = state:safe_set("snap:" .. version, format("%.3f\n", now) .. text)
    if ok then
        ok, err = state:safe_set("version", version)
    end
    if ok and old and old ~= version then
        state:delete("snap:" .. old)
    end
    state:delete("lock")
    if not ok then
        return nil, "put_snapshot: " .. err
    end
    return true
end

-- Keys ---------------------------------------------------------------------------------------

--- Version of the newest list of keys; nil before the first.
function _M.keys_version()
    return keys:get("version")
end

--- The newest list of keys, its JSON text, and its version; nil if there is none.
function _M.keys()
    local blob = keys:get("list")
    if not blob then
        return nil
    end
    local line_end = blob:find("\n", 1, true)
    return blob:sub(line_end + 1), blob:sub(1, line_end - 1)
end

--- Store a list of keys made for whoever had the version `basis`: a late answer never wins.
function _M.put_keys(basis, version, text)
    local ok, err = lock()
    if not ok then
        return nil, err
    end
    if keys:get("version") ~= basis then
        state:delete("lock")
        return nil, "put_keys: overtaken"
    end
    ok, err = keys:safe_set("list", version .. "\n" .. text)
    if ok then
        ok, err = keys:safe_set("version", version)
    end
    state:delete("lock")
    return ok, err and "put_keys: " .. err
end

--- Add to a count that is forgotten after so many seconds; returns the new value.
function _M.rate(key, delta, seconds)
    return rates:incr(key, delta, 0, seconds) or 0
end

--- Such a count as it stands.
function _M.rated(key)
    return rates:get(key) or 0
end

-- Leader -------------------------------------------------------------------------------------

--- Take or renew the leader's lease; `may_take` is false for a worker that should only renew.
function _M.lead(seconds, may_take)
    if state:get("leader") == my_tag then
        state:set("leader", my_tag, seconds)
        return true
    end
    return may_take and state:add("leader", my_tag, seconds) == true
end

--- Whether nobody leads.
function _M.leaderless()
    return state:get("leader") == nil
end

--- Give the lease up, if this worker has it.
function _M.abdicate()
    if state:get("leader") == my_tag then
        state:delete("leader")
    end
end

-- Times, demand, health ----------------------------------------------------------------------

--- Move a point in time forward; an older one changes nothing.
function _M.advance_time(key, now, seconds)
    local known = state:get(key)
    if not known or known < now then
        state:set(key, now, seconds or 0)
    end
end

--- A point in time, or nil.
function _M.time(key)
    return state:get(key)
end

--- Note demand nobody waits for: asked now, to be kept until `lease_end`.
function _M.want(service, now, lease_end)
    _M.advance_time("wanted:" .. service, now)
    _M.advance_time("lease:" .. service, lease_end)
end

--- Number of requests of all workers that may grow a replica's load within one window, after one
--- more.
function _M.grow(replica, now, window)
    local key = "grow:" .. replica .. ":" .. floor(now / window)
    return rates:incr(key, 1, 0, 1) or 0
end

--- The same number as it stands.
function _M.grown(replica, now, window)
    return rates:get("grow:" .. replica .. ":" .. floor(now / window)) or 0
end

--- Forget demand that was noted before a point in time.
function _M.void_demand(service, before)
    local wanted = state:get("wanted:" .. service)
    if wanted and wanted <= before then
        state:delete("wanted:" .. service)
        state:delete("lease:" .. service)
    end
end

--- Result of the last poll of one generation of a replica: "up", "down" or "unknown", and words.
function _M.set_health(replica, gen, health, detail, seconds)
    state:set("health:" .. replica, gen .. " " .. health .. " " .. detail, seconds)
end

--- What set_health stored, "unknown" and "" if it is about another generation.
function _M.health(replica, gen)
    local text = state:get("health:" .. replica)
    if text then
        local of, health, detail = text:match("^(%d+) (%a+) (.*)$")
        if tonumber(of) == gen then
            return health, detail
        end
    end
    return "unknown", ""
end

--- Suspect one generation of a replica: nothing connects to it until a poll started later passes.
function _M.suspect(replica, gen, now, seconds)
    if state:add("suspect:" .. replica .. ":" .. gen, now, seconds) then
        state:incr("suspicions", 1, 0)
    end
end

--- Since when it is suspected, or nil.
function _M.suspected(replica, gen)
    return state:get("suspect:" .. replica .. ":" .. gen)
end

--- Trust it again.
function _M.trust(replica, gen)
    state:delete("suspect:" .. replica .. ":" .. gen)
    state:incr("suspicions", 1, 0)
end

--- Changes with every suspicion raised or taken back.
function _M.suspicions()
    return state:get("suspicions") or 0
end

-- Pages --------------------------------------------------------------------------------------

--- A page kept for a moment; best effort. `began` is when its fetch began, `mark` what was told
--- of the gate's state then.
function _M.keep_page(key, text, began, mark, seconds)
    pages:set(key, format("%.6f %s\n", began, mark) .. text, seconds)
end

--- A page that was kept, when its fetch began, and its mark; or nil.
function _M.page(key)
    local kept = pages:get(key)
    if not kept then
        return nil
    end
    local began, mark, at = kept:match("^(%S+) (%S*)\n()")
    return kept:sub(at), tonumber(began), mark
end

--- Whether a page may be fetched now: `limit` times within so many seconds, in all workers.
function _M.may_fetch(key, limit, seconds)
    return (pages:incr("fetches:" .. key, 1, 0, seconds) or 0) <= limit
end

--- Note that something may have changed which only the backend knows of.
function _M.outdate_pages()
    state:incr("outdated", 1, 0)
end

--- How often that was noted.
function _M.outdated()
    return state:get("outdated") or 0
end

return _M
