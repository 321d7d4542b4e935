-- The request that a held stream makes of the gate's inner listener, to wait in its place: what it
-- is, what it is handed, and what is told with its answer. No state: what is handed over passes in
-- one header each way, between variables of nginx.

local cjson = require "cjson.safe"

local body_file = require "gate.body_file"
local clock = require "gate.clock"
local json = require "gate.json"
local settings = require "gate.settings"

local concat = table.concat
local max = math.max
local min = math.min
local pairs = pairs
local random = math.random
local tcp = ngx.socket.tcp
local tonumber = tonumber
local type = type

local HEADER = "X-Slurmgate-Inner"
local CONNECT_S = 1
local RETRY_MIN_S, RETRY_MAX_S = 0.01, 0.05 -- a burst may fill the listener's queue
local NO_SOCKET = "no such file" -- somebody removed it, or this nginx was told to end
local SEND_MS = 60000
local PIECE = 65536

-- What the inner request goes on with. It is not counted on the client's key: the outer one is, as
-- long as it lasts.
local HANDED = {
    "sg_service", "sg_uri", "sg_ticket", "sg_since", "sg_waited", "sg_tries", "sg_replays",
    "sg_sent_to", "sg_api", "sg_user", "sg_token", "sg_model", "sg_place", "sg_stream", "sg_origin",
}
-- Of this connection, or set by the gate
local NOT_PASSED = {
    ["connection"] = true, ["keep-alive"] = true, ["proxy-connection"] = true, ["te"] = true,
    ["trailer"] = true, ["transfer-encoding"] = true, ["upgrade"] = true,
    ["http2-settings"] = true, ["content-length"] = true, ["expect"] = true, ["host"] = true,
    ["x-request-id"] = true, ["x-forwarded-for"] = true, ["x-forwarded-proto"] = true,
    ["x-forwarded-host"] = true,
    -- The header of the answer is gone already: it can say nothing of an encoding.
    ["accept-encoding"] = true,
    [HEADER:lower()] = true,
}

local IS_HANDED = {}
for _, name in pairs(HANDED) do
    IS_HANDED[name] = true
end

local _M = {}

-- Asking --------------------------------------------------------------------------------------

-- The outer request has given its place away with this.
local function pack(var)
    local state = {}
    for i = 1, #HANDED do
        local name = HANDED[i]
        local value = var[name]
        if value and value ~= "" then
            state[name] = value
        end
    end
    var.sg_ticket = ""
    return json.encode(state)
end

local function connect()
    local deadline = clock.now() + CONNECT_S
    repeat
        local sock = tcp()
        sock:settimeouts(1000 * CONNECT_S, SEND_MS, SEND_MS)
        local ok, err = sock:connect("unix:" .. settings.inner_socket)
        if ok then
            return sock
        elseif err:find(NO_SOCKET, 1, true) then
            return nil
        end
        ngx.sleep(RETRY_MIN_S + random() * (RETRY_MAX_S - RETRY_MIN_S))
    until clock.now() > deadline
    return nil
end

local function body_of(var)
    local text = ngx.req.get_body_data()
    if text then
        return { length = #text, text = text }
    end
    local file, why = body_file.open()
    if file then
        local size = file:seek("end")
        file:seek("set")
        return { length = size, text = "", file = file }
    elseif why then
        ngx.log(ngx.WARN, "body of a held stream: ", why)
        return nil
    end
    local has_body = var.http_content_length or var.http_transfer_encoding
    return { length = has_body and 0 or -1, text = "" }
end

local function add(lines, name, value)
    if type(value) == "table" then
        for i = 1, #value do
            lines[#lines + 1] = name .. ": " .. value[i]
        end
    else
        lines[#lines + 1] = name .. ": " .. value
    end
end

local function head_of(var, length)
    local lines = {
        var.request_method .. " " .. var.request_uri .. " HTTP/1.1", "Host: " .. var.sg_host,
        "Connection: close", "Expect: 100-continue",
        "X-Request-Id: " .. var.sg_request_id, "X-Forwarded-For: " .. var.remote_addr,
        "X-Forwarded-Proto: " .. var.sg_proto, "X-Forwarded-Host: " .. var.sg_asked_host,
        HEADER .. ": " .. pack(var),
    }
    if length >= 0 then
        lines[#lines + 1] = "Content-Length: " .. length
    end
    for name, value in pairs(ngx.req.get_headers(0, true)) do
        -- What Connection names was taken away when the request came.
        if not NOT_PASSED[name:lower()] then
            add(lines, name, value)
        end
    end
    return concat(lines, "\r\n") .. "\r\n\r\n"
end

local function send_file(sock, file, left)
    while left > 0 do
        local piece = file:read(min(PIECE, left))
        if not piece then
            return nil, "body is shorter than it was"
        end
        local ok, err = sock:send(piece)
        if not ok then
            return nil, err
        end
        left = left - #piece
    end
    return true
end

--- A connection to the inner listener, and the body to be sent: a table with its length (-1 for no
--- body at all), and its text or its open file. nil if either cannot be had.
function _M.open(var)
    local body = body_of(var)
    local sock = body and connect()
    return sock, body
end

--- Set how long the next reading may wait.
function _M.await(sock, seconds)
    sock:settimeouts(SEND_MS, SEND_MS, max(1, 1000 * seconds))
end

--- Send the head of the request. It is counted in place of the outer one when its body is asked
--- for (100 Continue).
function _M.send_head(var, sock, body)
    return sock:send(head_of(var, body.length))
end

--- Send the body.
function _M.send_body(sock, body)
    local ok = body.text == "" or sock:send(body.text)
    if body.file then
        ok = send_file(sock, body.file, body.length)
        body.file:close()
    end
    return ok
end

-- Handing over --------------------------------------------------------------------------------

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
        ngx.header[HEADER] = tries .. " " .. waited .. " " .. (code or "-")
    end
end

--- Note what was told.
function _M.note(var, headers)
    local tries, waited, code = (headers[HEADER:lower()] or ""):match("^(%d+) (%S+) (%S+)$")
    if tries then
        var.sg_tries, var.sg_waited = tries, ("%.3f"):format(waited)
        var.sg_problem = code ~= "-" and code or ""
    end
    -- Counted there by the inner one: this is for the log.
    var.sg_off = headers["x-slurmgate-replica"] or var.sg_off
end

return _M
