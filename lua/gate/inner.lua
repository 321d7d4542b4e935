-- What a request that begins to send comment lines hands to the one it makes of the gate's inner
-- listener, and what it is told with that one's answer. No state: it all passes in one header each
-- way, between variables of nginx.

local cjson = require "cjson.safe"

local pairs = pairs
local tonumber = tonumber
local type = type

-- What the inner request goes on with. It is no use of its own and not counted on the client's key:
-- the outer one is, as long as it lasts.
local HANDED = {
    "sg_service", "sg_uri", "sg_ticket", "sg_since", "sg_waited", "sg_tries", "sg_replays",
    "sg_sent_to", "sg_api", "sg_user", "sg_token", "sg_model", "sg_place", "sg_stream", "sg_origin",
    "sg_path",
}
local IS_HANDED = {}
for _, name in pairs(HANDED) do
    IS_HANDED[name] = true
end

local _M = { HEADER = "X-Slurmgate-Inner" }

--- The header of the inner request. The outer one has given its place away with it.
function _M.pack(var)
    local state = {}
    for i = 1, #HANDED do
        local name = HANDED[i]
        local value = var[name]
        if value and value ~= "" then
            state[name] = value
        end
    end
    var.sg_ticket = ""
    return (cjson.encode(state):gsub("\\/", "/"))
end

--- Take over what the outer request handed over; false if there is nothing of the kind.
function _M.unpack(var)
    local state = cjson.decode(var.http_x_slurmgate_inner or "")
    if type(state) ~= "table" or not state.sg_service then
        return false
    end
    for name, value in pairs(state) do
        if IS_HANDED[name] then
            var[name] = value
        end
    end
    var.sg_relayed = "1"
    return true
end

--- Tell the outer request how it went on, for its line in the access log; `code` is that of the
--- gate's own answer, or nil.
function _M.tell(var, code)
    if var.sg_relayed == "1" then
        local tries, waited = tonumber(var.sg_tries) or 0, tonumber(var.sg_waited) or 0
        ngx.header[_M.HEADER] = tries .. " " .. waited .. " " .. (code or "-")
    end
end

--- Note what was told.
function _M.note(var, headers)
    local tries, waited, code = (headers[_M.HEADER:lower()] or ""):match("^(%d+) (%S+) (%S+)$")
    if tries then
        var.sg_tries, var.sg_waited = tries, ("%.3f"):format(waited)
        var.sg_problem = code ~= "-" and code or ""
    end
    -- Counted there by the inner one: this is for the log.
    var.sg_off = headers["x-slurmgate-replica"] or var.sg_off
end

return _M
