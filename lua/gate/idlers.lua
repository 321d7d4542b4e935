-- Clients that keep a websocket or an event stream open and are silent. Services may say after how
-- long (max_idle_connection) those count no longer: neither as use of the service, nor as in flight
-- on the replica, so that it may stop or be replaced. The connection stays, and counts again with
-- the client's next byte.
--
-- Over HTTP/2 bytes are no single request's: there it is the time since it was sent to the replica.
-- A request that was sent while its service did not want this counts to its end.
--
-- Per worker: when it last looked, whether any service wants it.

local activity = require "gate.activity"
local client = require "gate.client"
local flows = require "gate.flows"
local registry = require "gate.registry"

local find = string.find
local ipairs = ipairs
local min = math.min

local LOOK_S = 0.5
local SWITCHED = "101"
local EVENTS = "^text/event%-stream"

local looked = 0
local wanted = false
local wanted_in -- version of the snapshot that says so

local _M = {}

local function anybody_wants()
    local version = registry.version()
    if version ~= wanted_in then
        wanted, wanted_in = false, version
        for _, service in ipairs(registry.services()) do
            wanted = wanted or service.max_idle_connection > 0
        end
    end
    return wanted or flows.any_parked()
end

local function stays_open(at)
    return flows.read(at, "status") == SWITCHED
        or find(flows.read(at, "sent_http_content_type") or "", EVENTS) ~= nil
end

-- The time a request was held is not its client's silence.
local function silent_for(at, now)
    local since = now - (flows.began(at) or now)
    if flows.read(at, "server_protocol") ~= "HTTP/1.1" then
        return since
    end
    return min(since, client.silent_for(flows.request(at)) or since)
end

local function look_at(at, replica, now)
    local limit = replica.service.max_idle_connection
    local left_out = flows.parked(at) ~= nil
    if limit == 0 and not left_out or not stays_open(at) then
        return
    end
    local silent = limit > 0 and silent_for(at, now) >= limit
    if silent and not left_out then
        activity.park(at, replica)
    elseif left_out and not silent then
        activity.unpark(at, replica)
    end
end

--- Look at all of this worker's requests now and then; called by the tick.
function _M.look(now)
    if now - looked < LOOK_S or not anybody_wants() then
        return
    end
    looked = now
    for at, replica in flows.all() do
        look_at(at, replica, now)
    end
end

--- Whether any request of this worker is left out of its counts.
function _M.any()
    return flows.any_parked()
end

return _M
