-- The exchange with the backend: what the gate knows goes up; the snapshot and the clients' keys
-- come down when they are others. Level-triggered: losing a call loses nothing. Calls run in a
-- timer of their own, so a backend that hangs blocks nobody.
--
-- Per worker: whether a call is under way or asked for, when the last one began, whether the
-- backend answered it, how many admin calls are under way. Shared (through the store): when any
-- worker last had traffic or waiting requests, the newest call the backend answered.

local cjson = require "cjson.safe"

local activity = require "gate.activity"
local clock = require "gate.clock"
local http = require "gate.http"
local keys = require "gate.keys"
local registry = require "gate.registry"
local settings = require "gate.settings"
local store = require "gate.store"

local sleep = ngx.sleep
local timer_at = ngx.timer.at
local format = string.format
local ipairs = ipairs
local max = math.max
local pairs = pairs
local type = type

local CALL_TIMEOUT_S = 2
local ANSWER_LIMIT = 64 * 1024 * 1024
local HURRY_PACE_S = 0.02 -- while an operator waits for the backend, and it for the gate
local WAITING_PACE_S = 0.05
local TRAFFIC_PACE_S = 0.25
local REST_PACE_S = 1
local AWAY_PACE_S = 0.25 -- each failed call is a line in nginx's log
local RECENT_S = 0.3     -- traffic and waiting noted that long ago are still news
local SIGNAL_EVERY_S = 0.02

local FRESH_S = 0.05
local CONFIRM_LOOK_S = 0.002
local CONFIRM_WITHIN_S = 0.5

local calling = false
local asked_again = false
local last_call = 0
local last_signal = 0
local began_then = 0
local hurries = 0 -- admin calls under way
local reachable = true
local on_change

local _M = {}

local function recent(what, now)
    return now - (store.time(what) or 0) < RECENT_S
end

local function compose(now)
    keys.refresh()
    registry.refresh()
    local version, of_keys = registry.version(), keys.version()
    local up = {
        gate = store.boot_id(), snapshot = cjson.null, keys = of_keys or cjson.null,
        services = {}, replicas = {},
    }
    if version then
        local epoch, n = store.parse_version(version)
        up.snapshot = { epoch = epoch, n = n }
    end
    -- From here on only counts are read: the version was read before them.
    local tags = store.workers()
    for _, service in ipairs(registry.services()) do
        up.services[service.name] = activity.report(tags, service.name, now)
    end
    for id, replica in pairs(registry.replicas()) do
        local health, detail = store.health(id, replica.gen)
        up.replicas[id] = {
            gen = replica.gen, in_flight = activity.on_replica(tags, replica),
            health = health, detail = detail,
        }
    end
    up.key_use = keys.report(tags)
    return cjson.encode(up), { snapshot = version, keys = of_keys }
end

-- What is kept of a service is what runs and how it is; what it is for is as the newest says.
local OBSERVED = {
    "replicas", "state", "reason", "refusal", "progress", "retry_after_s", "starts_at",
}

local function with_replicas_of(kept, entry)
    if not kept or not entry.route_name then
        return kept or entry
    end
    for _, name in ipairs(OBSERVED) do
        entry[name] = kept[name]
    end
    entry.unknown = nil
    return entry
end

local function keep_unknown(down)
    local kept
    local services = {}
    for i, entry in ipairs(down.services) do
        if entry.unknown == true then
            kept = kept or registry.stored_entries()
            entry = with_replicas_of(kept[entry.name], entry)
        end
        services[i] = entry
    end
    if kept then
        down.services = services
        return cjson.encode(down)
    end
    return nil
end

-- A replica that just left the choice can end as soon as the backend has the counts that follow.
local function any_draining()
    for _, replica in pairs(registry.replicas()) do
        if replica.phase == "draining" then
            return true
        end
    end
    return false
end

-- Leases that the backend has ended shall not come back with its next start.
local function end_leases(entries, now)
    for _, entry in ipairs(entries) do
        local age = entry.leases_void_s
        if type(age) == "number" then
            store.void_demand(entry.name, now - age)
        end
    end
end

local function take_snapshot(down, body, basis)
    end_leases(down.services, clock.now())
    local text = keep_unknown(down) or body
    local name = format("%s:%d", down.version.epoch, down.version.n)
    local ok, err = store.put_snapshot(basis, name, text, clock.now())
    if ok then
        registry.refresh()
        on_change()
        asked_again = asked_again or recent("seen:hurry", last_call) or any_draining()
    end
    return ok ~= nil, err
end

-- The keys come first: nobody may see a service before it is known who may use it.
local function take(body, basis)
    local down = cjson.decode(body)
    local listed = down and down.version and down.services
    if not listed and not (down and down.keys) then
        return nil, "answer without version or services"
    end
    if down.keys then
        local ok, err = keys.put(basis.keys, down.keys)
        if not ok then
            -- Another worker's call was quicker: the next answer fits what it brought.
            asked_again = keys.version() ~= basis.keys
            return asked_again or nil, err
        end
        -- A backend that is about to open another address waits to hear that they are here.
        asked_again = true
    end
    if listed then
        return take_snapshot(down, body, basis.snapshot)
    end
    return true
end

local function call()
    local now = clock.now()
    last_call = now
    local body, basis = compose(now)
    local answer, err = http.request {
        endpoint = "unix:" .. settings.control_socket, method = "POST", path = "/gate/notify",
        headers = { ["Content-Type"] = "application/json" }, body = body,
        timeout = CALL_TIMEOUT_S, limit = ANSWER_LIMIT, keepalive = true,
    }
    if not answer then
        return nil, err
    elseif answer.status == 204 then
        return true
    elseif answer.status == 200 then
        return take(answer.body, basis)
    end
    return nil, "status " .. answer.status
end

local function call_until_quiet()
    repeat
        asked_again = false
        local done, ok, err = pcall(call)
        if not done then
            ok, err = nil, ok
        end
        if ok and not reachable then
            ngx.log(ngx.NOTICE, "backend answers again")
        elseif not ok and reachable then
            ngx.log(ngx.WARN, "notify: ", err, "; trying on")
        end
        reachable = ok
        if ok then
            store.advance_time("confirmed", last_call)
        end
    until not (asked_again and reachable)
    calling = false
end

--- Call the backend now; asked for during a call, another one follows it.
function _M.kick()
    if calling then
        asked_again = true
        return
    end
    calling = true
    local ok, err = timer_at(0, call_until_quiet)
    if not ok then
        calling = false
        ngx.log(ngx.WARN, "notify timer: ", err)
    end
end

--- Have the backend confirm this view, unless it did so a moment ago. A refusal that rests on an
--- older view may be out of date: an operator has just added the service, or switched it on. Waits
--- half a second at most, and not at all while the backend is away. Returns whether the view is
--- another now. With `fresh` zero only a call that begins from now on will do: then the backend
--- also knows of every request so far.
function _M.confirm(fresh)
    local began, before = clock.now(), registry.version()
    local since = began - (fresh or FRESH_S)
    while reachable and (store.time("confirmed") or 0) < since do
        if clock.now() - began > CONFIRM_WITHIN_S then
            break
        end
        -- A call that began early enough need only end.
        if last_call < since then
            _M.kick()
        end
        sleep(CONFIRM_LOOK_S)
    end
    registry.refresh()
    return registry.version() ~= before
end

--- An admin call goes to the backend, whose answer waits until the gate has the snapshot that comes
--- of it: until `calm_down` the calls come quickly, whichever worker makes them.
function _M.hurry()
    hurries = hurries + 1
    store.advance_time("seen:hurry", clock.now())
end

--- That admin call has ended.
function _M.calm_down()
    hurries = hurries - 1
end

--- Whether an admin call of this worker is under way.
function _M.hurries()
    return hurries > 0
end

--- Tell the leader what sets the pace of its calls; every worker's tick.
function _M.signal(now, waiting)
    if now - last_signal < SIGNAL_EVERY_S then
        return
    end
    last_signal = now
    if hurries > 0 then
        store.advance_time("seen:hurry", now)
    end
    if waiting then
        store.advance_time("seen:waiting", now)
    elseif activity.holding() > 0 or activity.began() ~= began_then then
        began_then = activity.began()
        store.advance_time("seen:traffic", now)
    end
end

--- Make the periodic call when it is due; the leader's tick.
function _M.keep_pace(now)
    local pace = REST_PACE_S
    if recent("seen:hurry", now) then
        pace = HURRY_PACE_S
    elseif recent("seen:waiting", now) then
        pace = WAITING_PACE_S
    elseif recent("seen:traffic", now) then
        pace = TRAFFIC_PACE_S
    end
    if not reachable then
        pace = max(pace, AWAY_PACE_S)
    end
    if now - last_call >= pace and not calling then
        _M.kick()
    end
end

--- Begin; `changed` is called after this worker stored a new snapshot.
function _M.start(changed)
    on_change = changed
end

return _M
