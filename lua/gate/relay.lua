-- The answer of a held stream whose client has heard nothing for long: comment lines while it
-- waits, then the service's own stream. That comes by way of the gate's inner listener, where the
-- same request is held, balanced and replayed as any other is; it has taken this one's place in the
-- waiting room, and is counted in its stead, but not on the client's key. Whatever else comes from
-- there becomes one error event. No state.

local activity = require "gate.activity"
local client = require "gate.client"
local clock = require "gate.clock"
local events = require "gate.events"
local inner = require "gate.inner"
local problem = require "gate.problem"
local registry = require "gate.registry"
local routing = require "gate.routing"

local concat = table.concat
local min = math.min
local tonumber = tonumber

local CONTINUE = 100
local SILENT_S = 24 * 3600 -- how long a service may be silent, the inner request knows
local PIECE = 65536
local BODY_SHOWN = 65536

local _M = {}

-- Who is answered so -------------------------------------------------------------------------

--- Seconds until the client of a request that wants a stream is to hear of it; huge for never.
function _M.due_in(var, name)
    local service = registry.find(name)
    if not service or service.heartbeat == 0 or var.sg_relayed == "1"
        or var.sg_streaming ~= "" or var.sg_passive == "1" then
        return math.huge
    end
    return tonumber(var.sg_since) + service.heartbeat - clock.now()
end

--- Whether a held request wants a stream; may yield.
function _M.wanted(var)
    if var.request_method == "HEAD" or var.sg_upgrade ~= "" then
        return false
    elseif events.only_stream(ngx.req.get_headers(0)["accept"]) then
        return true
    end
    routing.look_into(var)
    return var.sg_stream == "1"
end

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
    if not service or #service.routable > 0 then
        return events.waiting(service and service.state)
    end
    local progress = service.progress or {}
    local facts = problem.service_facts(service, false, nil, clock.now())
    return events.waiting(progress.state or service.state, progress.reason, facts.estimate)
end

local function beat(var)
    -- nginx sees no end behind the next request that the client has sent already.
    if var.server_protocol ~= "HTTP/2.0" and client.gone() then
        return cut()
    end
    registry.refresh()
    return say(comment(registry.find(var.sg_service)))
end

-- The answer from there -----------------------------------------------------------------------

-- One line of the head; while there is none, comment lines go out. Without one: nil, why, and what
-- came of it.
local function await_line(var, sock, rhythm)
    local kept = ""
    while true do
        inner.await(sock, rhythm.next - clock.now())
        local line, err, part = sock:receive("*l")
        if line then
            return kept .. line
        elseif err ~= "timeout" then
            return nil, err, kept .. (part or "")
        end
        kept = kept .. (part or "")
        beat(var)
        rhythm.next = clock.now() + rhythm.period
    end
end

-- Status and headers of the next head; none for one that only says to go on. Without one: nil, why,
-- and whether nothing at all came.
local function await_head(var, sock, rhythm)
    local line, err, part = await_line(var, sock, rhythm)
    local silent = part == ""
    local status = line and tonumber(line:match("^HTTP/1%.1 (%d%d%d)"))
    local headers = {}
    while status do
        line, err = await_line(var, sock, rhythm)
        if line == "" then
            return status, headers
        end
        local name, value = (line or ""):match("^([^:%s]+):%s*(.-)%s*$")
        if not name then
            break
        end
        headers[name:lower()] = value
    end
    return nil, err or "no answer", silent
end

local function next_chunk(sock)
    local line = sock:receive("*l")
    local digits = line and line:match("^%x+")
    local n = digits and tonumber(digits, 16)
    if not n then
        return nil
    elseif n == 0 then
        return sock:receive("*l") and ""
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
        if left == 0 then
            return ""
        end
        local piece = sock:receiveany(min(left, PIECE))
        left = left - #(piece or "")
        return piece
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

-- Ask the inner listener; status and headers of its answer. Without one: nil, why, and whether
-- nothing was heard of the request.
local function ask(var, sock, body, rhythm)
    local ok, err = inner.send_head(var, sock, body)
    if not ok then
        return nil, err, true
    end
    local status, headers, silent = await_head(var, sock, rhythm)
    if status == CONTINUE then
        activity.hand_over(var)
        ok, err = inner.send_body(sock, body)
        if not ok then
            return nil, err, true
        end
        status, headers, silent = await_head(var, sock, rhythm)
    end
    return status, headers, silent
end

-- The worker that had the inner request was killed: another one may have it anew. A replica may
-- have had it, so it counts as sent again.
local function open_again(var)
    local service = registry.find(var.sg_service)
    local replays = tonumber(var.sg_replays) or 0
    if not service or replays >= service.replay then
        return nil
    end
    var.sg_replays = replays + 1
    return inner.open(var)
end

local function relay(var, sock, body, rhythm)
    local status, headers, silent
    while sock do
        status, headers, silent = ask(var, sock, body, rhythm)
        if status then
            break
        end
        ngx.log(ngx.WARN, "inner request: ", headers)
        sock:close()
        sock = nil
        if silent then
            sock, body = open_again(var)
        end
    end
    activity.end_waiting(var) -- the body's bytes: a replica has it from here on, or none will
    if not status then
        return fail(var, "upstream-failed")
    end
    inner.await(sock, SILENT_S)
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
    local service = registry.find(var.sg_service)
    local sock, body
    if service then
        sock, body = inner.open(var)
    end
    if not sock then
        -- Nothing was sent yet: it waits on as it did, and its client goes on hearing nothing.
        var.sg_streaming = "0"
        return ngx.exec("@hold")
    end
    begin(var)
    beat(var)
    local period = service.heartbeat
    return relay(var, sock, body, { period = period, next = clock.now() + period })
end

return _M
