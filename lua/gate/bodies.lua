-- Read the body of a request that is to wait, with as many bytes reserved as it takes, so that all
-- waiting bodies together stay within a bound. No state; the reserved bytes are activity's.

local activity = require "gate.activity"
local clock = require "gate.clock"
local settings = require "gate.settings"

local min = math.min
local random = math.random
local tonumber = tonumber

local TURN_S = 5 -- longest wait for the turn to read a body of unknown length
local LOOK_MIN_S, LOOK_MAX_S = 0.01, 0.05

local _M = {}

-- A body of unknown length may take all that is left, but only while it is read: others of unknown
-- length wait a moment for their turn.
local function reserve_what_is_left(var)
    local deadline = clock.now() + TURN_S
    repeat
        local left = settings.max_held_bytes - activity.reserved()
        if left > 0 then
            if activity.reserve(var, min(settings.max_body, left)) <= settings.max_held_bytes then
                return true
            end
            activity.reserve(var, 0)
        end
        ngx.sleep(LOOK_MIN_S + random() * (LOOK_MAX_S - LOOK_MIN_S))
    until clock.now() > deadline
    return false
end

-- Whether the request may bring a body without having said how long it is. Over HTTP/2 nothing says
-- so; there a GET has none as good as always, and what it brings after all is reserved afterwards.
local function of_unknown_length(var)
    return var.http_transfer_encoding
        or (var.server_protocol == "HTTP/2.0" and var.request_method ~= "GET")
end

--- Read the body; an abort of the client is seen only by a location that begins after that. Returns
--- whether it may be held.
function _M.read(var)
    local length = tonumber(var.http_content_length)
    local unknown = not length and of_unknown_length(var)
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
    if unknown or (not length and ngx.req.get_body_file()) then
        local taken = min(settings.max_body, tonumber(var.request_length))
        return activity.reserve(var, taken) <= settings.max_held_bytes
    end
    return true
end

return _M
