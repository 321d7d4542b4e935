-- The answer of a held stream whose client has heard nothing for long: comment lines while it
-- waits, then the service's own stream. That comes by way of the gate's inner listener, where the
-- same request is held, balanced and replayed as any other is; it has taken this one's place in the
-- waiting room. Whatever else comes from there becomes one error event. No state: the counts this
-- request still has are its use, its key's, and the bytes of its body.

local activity = require "gate.activity"
local body_file = require "gate.body_file"
local client = require "gate.client"
local clock = require "gate.clock"
local events = require "gate.events"
local inner = require "gate.inner"
local problem = require "gate.problem"
local registry = require "gate.registry"
local settings = require "gate.settings"

local concat = table.concat
local max = math.max
local min = math.min
local pairs = pairs
local random = math.random
local tcp = ngx.socket.tcp
local tonumber = tonumber
local type = type

local CONNECT_S = 5
local RETRY_MIN_S, RETRY_MAX_S = 0.01, 0.05 -- a burst may fill the listener's queue
local SEND_MS = 60000
local SILENT_MS = 24 * 3600 * 1000 -- how long a service may be silent, the inner request knows
local PIECE = 65536
local BODY_SHOWN = 65536

-- Of this connection, or set by the gate
local NOT_PASSED = {
    ["connection"] = true, ["keep-alive"] = true, ["proxy-connection"] = true, ["te"] = true,
    ["trailer"] = true, ["transfer-encoding"] = true, ["upgrade"] = true,
    ["http2-settings"] = true, ["content-length"] = true, ["expect"] = true, ["host"] = true,
    ["x-request-id"] = true, ["x-forwarded-for"] = true, ["x-forwarded-proto"] = true,
    ["x-forwarded-host"] = true,
    -- The header of the answer is gone already: it can say nothing of an encoding.
    ["accept-encoding"] = true,
    [inner.HEADER:lower()] = true,
}

local _M = {}

-- To the client -------------------------------------------------------------------------------

-- The end of an answer that is not whole: the client sees that it was cut off.
local function cut()
    return ngx.exit(ngx.ERROR)
end

local function say(text)
    if not ngx.print(text) or not ngx.flush(true) then
        return cut()
    end
    return true
end

local function begin(var)
    ngx.header["Content-Type"] = "text/event-stream"
    ngx.header["Cache-Control"] = "no-store"
    ngx.header["X-Accel-Buffering"] = "no"
    var.sg_streaming = "1"
end

local function comment(service)
    local progress = service.progress or {}
    local state = #service.routable == 0 and progress.state or service.state
    local facts = problem.service_facts(service, false, nil, clock.now())
    local estimate = #service.routable == 0 and facts.estimate or nil
    return events.waiting(state, progress.reason, estimate)
end

local function beat(var)
    -- nginx sees no end behind the next request that the client has sent already.
    if var.server_protocol ~= "HTTP/2.0" and client.gone() then
        return cut()
    end
    registry.refresh()
    local service = registry.find(var.sg_service)
    return say(service and comment(service) or events.waiting())
end

-- To the inner listener -----------------------------------------------------------------------

local function connect()
    local deadline = clock.now() + CONNECT_S
    repeat
        local sock = tcp()
        sock:settimeouts(1000 * CONNECT_S, SEND_MS, SILENT_MS)
        local ok = sock:connect("unix:" .. settings.inner_socket)
        if ok then
            return sock
        end
        ngx.sleep(RETRY_MIN_S + random() * (RETRY_MAX_S - RETRY_MIN_S))
    until clock.now() > deadline
    return nil
end

-- The body: its length (-1 for none at all), and its text or its open file. nil if it cannot be had.
local function body_of(var)
    local text = ngx.req.get_body_data()
    if text then
        return #text, text
    end
    local file, why = body_file.open()
    if file then
        local size = file:seek("end")
        file:seek("set")
        return size, "", file
    elseif why then
        ngx.log(ngx.WARN, "body of a held stream: ", why)
        return nil
    end
    local has_body = var.http_content_length or var.http_transfer_encoding
    return has_body and 0 or -1, ""
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

-- Names that the Connection header says are of this connection only
local function named()
    local names, value = {}, ngx.req.get_headers(0)["connection"]
    for name in (type(value) == "table" and concat(value, ",") or value or ""):gmatch("[^,%s]+") do
        names[name:lower()] = true
    end
    return names
end

local function head_of(var, length)
    local skipped = named()
    local lines = {
        var.request_method .. " / HTTP/1.1", "Host: " .. var.sg_host, "Connection: close",
        "X-Request-Id: " .. var.sg_request_id, "X-Forwarded-For: " .. var.remote_addr,
        "X-Forwarded-Proto: " .. var.sg_proto, "X-Forwarded-Host: " .. var.sg_asked_host,
        inner.HEADER .. ": " .. inner.pack(var),
    }
    if length >= 0 then
        lines[#lines + 1] = "Content-Length: " .. length
    end
    for name, value in pairs(ngx.req.get_headers(0, true)) do
        local lower = name:lower()
        if not NOT_PASSED[lower] and not skipped[lower] then
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

-- The answer from there -----------------------------------------------------------------------

-- One line of the head; while there is none, comment lines go out.
local function await_line(var, sock, rhythm)
    local kept = ""
    while true do
        sock:settimeout(max(1, 1000 * (rhythm.next - clock.now())))
        local line, err, part = sock:receive("*l")
        if line then
            return kept .. line
        elseif err ~= "timeout" then
            return nil, err
        end
        kept = kept .. (part or "")
        beat(var)
        rhythm.next = clock.now() + rhythm.period
    end
end

local function await_head(var, sock, period)
    local rhythm = { period = period, next = clock.now() + period }
    local line, err = await_line(var, sock, rhythm)
    local status = line and tonumber(line:match("^HTTP/1%.1 (%d%d%d)"))
    local headers = {}
    while status do
        line, err = await_line(var, sock, rhythm)
        if line == "" then
            sock:settimeout(SILENT_MS)
            return status, headers
        end
        local name, value = (line or ""):match("^([^:%s]+):%s*(.-)%s*$")
        if not name then
            break
        end
        headers[name:lower()] = value
    end
    return nil, err or "no answer"
end

local function next_chunk(sock)
    local line = sock:receive("*l")
    local n = line and tonumber(line:match("^%x+"), 16)
    if not n then
        return nil
    elseif n == 0 then
        return ""
    end
    local piece = sock:receive(n)
    return piece and sock:receive(2) and piece
end

-- A function that gives one piece of the body after the other, "" at the end, and nil where it
-- breaks off.
local function pieces(sock, headers)
    if headers["transfer-encoding"] then
        return function()
            return next_chunk(sock)
        end
    end
    local left = tonumber(headers["content-length"]) or 0
    return function()
        local n = min(left, PIECE)
        left = left - n
        return n == 0 and "" or sock:receive(n)
    end
end

local function pass_on(next_piece)
    while true do
        local piece = next_piece()
        if not piece then
            return cut()
        elseif piece == "" then
            return true
        end
        say(piece)
    end
end

-- As much of an answer that is no stream as its client is shown
local function beginning(next_piece)
    local parts, size = {}, 0
    local piece = next_piece()
    while piece and piece ~= "" and size < BODY_SHOWN do
        parts[#parts + 1] = piece
        size = size + #piece
        piece = next_piece()
    end
    return concat(parts):sub(1, BODY_SHOWN)
end

local function fail(var, code)
    local status, _, text = problem.render(code, { shape = var.sg_api })
    var.sg_problem = code
    return say(events.failure(var.sg_api, status, text))
end

local function relay(var, sock, period)
    local status, headers = await_head(var, sock, period)
    -- The inner request has it from here on, or none of it.
    activity.end_waiting(var)
    if not status then
        return fail(var, "upstream-failed")
    end
    inner.note(var, headers)
    local next_piece = pieces(sock, headers)
    local coding = headers["content-encoding"] or "identity"
    if status == 200 and events.is_stream(headers["content-type"]) and coding == "identity" then
        return pass_on(next_piece)
    end
    return say(events.failure(var.sg_api, status, beginning(next_piece)))
end

--- Answer a held request that wants a stream and has left its room; the content handler of @relay.
function _M.answer(var)
    local length, text, file = body_of(var)
    local sock = length and connect()
    local service = registry.find(var.sg_service)
    if not sock or not service then
        -- Nothing was sent yet: it waits on as it did, and its client goes on hearing nothing.
        var.sg_streaming = "0"
        activity.begin_waiting(var, var.sg_service)
        return ngx.exec("@hold")
    end
    local head = head_of(var, length)
    begin(var)
    beat(var)
    local ok = sock:send(head .. text)
    if ok and file then
        ok = send_file(sock, file, length)
        file:close()
    end
    if not ok then
        return fail(var, "upstream-failed")
    end
    return relay(var, sock, service.heartbeat)
end

return _M
