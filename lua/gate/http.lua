-- A small HTTP/1.1 client on cosockets, for the backend's sockets and for health polls. One
-- deadline and one size bound for the whole exchange. No state but nginx's own connection pool.

local clock = require "gate.clock"

local tcp = ngx.socket.tcp
local concat = table.concat
local max = math.max
local min = math.min
local tonumber = tonumber

local HEADER_LIMIT = 65536
local KEEPALIVE_MS = 10000
local POOL_SIZE = 8
local LONGEST_MS = 2 ^ 31 - 1 -- what cosockets take; configured timeouts may be longer

local _M = {}

local function arm(sock, deadline)
    local left = (deadline - clock.now()) * 1000
    if left <= 0 then
        return nil, "timeout"
    end
    left = min(LONGEST_MS, max(1, left))
    sock:settimeouts(left, left, left)
    return true
end

local function receive(sock, deadline, what)
    local ok, err = arm(sock, deadline)
    if not ok then
        return nil, err
    end
    return sock:receive(what)
end

local function read_headers(sock, deadline)
    local headers, size = {}, 0
    while true do
        local line, err = receive(sock, deadline, "*l")
        if not line then
            return nil, err
        end
        if line == "" then
            return headers
        end
        size = size + #line
        if size > HEADER_LIMIT then
            return nil, "headers too large"
        end
        local name, value = line:match("^([^:%s]+):%s*(.-)%s*$")
        if name then
            headers[name:lower()] = value
        end
    end
end

local function read_head(sock, deadline)
    while true do
        local line, err = receive(sock, deadline, "*l")
        if not line then
            return nil, err
        end
        local minor, status = line:match("^HTTP/1%.(%d) (%d%d%d)")
        if not status then
            return nil, "not an HTTP answer"
        end
        local headers
        headers, err = read_headers(sock, deadline)
        if not headers then
            return nil, err
        end
        status = tonumber(status)
        if status >= 200 then
            return status, headers, minor == "1"
        end
    end
end

local function read_chunked(sock, deadline, limit)
    local parts, size = {}, 0
    while true do
        local line, err = receive(sock, deadline, "*l")
        local n = line and tonumber(line:match("^%x+"), 16)
        if not n then
            return nil, err or "bad chunk"
        end
        if n == 0 then
            local ok
            ok, err = read_headers(sock, deadline)
            return ok and concat(parts), err
        end
        size = size + n
        if size > limit then
            return nil, "body too large"
        end
        local part
        part, err = receive(sock, deadline, n)
        if not part then
            return nil, err
        end
        parts[#parts + 1] = part
        line, err = receive(sock, deadline, "*l")
        if line ~= "" then
            return nil, err or "bad chunk"
        end
    end
end

local function read_until_close(sock, deadline, limit)
    local parts, size = {}, 0
    while true do
        local ok, err = arm(sock, deadline)
        if not ok then
            return nil, err
        end
        local part
        part, err = sock:receiveany(8192)
        if not part then
            return err == "closed" and concat(parts) or nil, err
        end
        size = size + #part
        if size > limit then
            return nil, "body too large"
        end
        parts[#parts + 1] = part
    end
end

local function read_body(sock, deadline, status, headers, limit)
    if status == 204 or status == 304 then
        return "", nil, true
    end
    local coding = headers["transfer-encoding"]
    if coding and coding:lower():find("chunked", 1, true) then
        local body, err = read_chunked(sock, deadline, limit)
        return body, err, true
    end
    local length = headers["content-length"]
    if not length then
        local body, err = read_until_close(sock, deadline, limit)
        return body, err, false
    end
    length = tonumber(length)
    if not length or length < 0 or length > limit then
        return nil, "body too large", false
    end
    if length == 0 then
        return "", nil, true
    end
    local body, err = receive(sock, deadline, length)
    return body, err, true
end

local function exchange(sock, call, deadline)
    local body = call.body or ""
    local lines = {
        call.method .. " " .. call.path .. " HTTP/1.1", "Host: " .. (call.host or "localhost"),
        "User-Agent: slurmgate", "Connection: " .. (call.keepalive and "keep-alive" or "close"),
    }
    for name, value in pairs(call.headers or {}) do
        lines[#lines + 1] = name .. ": " .. value
    end
    if call.body then
        lines[#lines + 1] = "Content-Length: " .. #body
    end
    local sent, err = sock:send(concat(lines, "\r\n") .. "\r\n\r\n" .. body)
    if not sent then
        return nil, "send: " .. err
    end
    local status, headers, persistent = read_head(sock, deadline)
    if not status then
        return nil, "read: " .. headers
    end
    local text, read_err, framed = read_body(sock, deadline, status, headers, call.limit)
    if not text and not call.status_only then
        return nil, "read: " .. read_err
    end
    local stays = call.keepalive and text and framed and persistent
        and (headers.connection or ""):lower() ~= "close"
    return { status = status, headers = headers, body = text }, nil, stays
end

-- Through a tunnel every connect succeeds, and a far end that refuses is seen as a close. Whoever
-- has sent by then makes nginx log an error, so give that close some time to come first.
local function refused(sock, seconds)
    sock:settimeouts(1000 * seconds, 1000 * seconds, 1000 * seconds)
    local _, err = sock:receive(1)
    return err ~= "timeout" and (err == "closed" and "refused behind the tunnel" or "spoke first")
end

--- Make one call. `call`: endpoint ("host:port" or "unix:/path"), method, path, host, headers,
--- body, timeout (seconds, for everything together), limit (bytes of answer body), keepalive,
--- status_only (a body that is too long or breaks off is no failure), settle (seconds to wait for
--- a tunnel's far end to refuse). Returns {status, headers, body} or nil, "connect: reason" and the
--- like.
function _M.request(call)
    local deadline = clock.now() + call.timeout
    local sock = tcp()
    local ok, err = arm(sock, deadline)
    if ok then
        if call.endpoint:sub(1, 5) == "unix:" then
            ok, err = sock:connect(call.endpoint)
        else
            local host, port = call.endpoint:match("^(.*):(%d+)$")
            ok, err = sock:connect(host, min(65535, tonumber(port)))
        end
    end
    if ok and call.settle then
        err = refused(sock, call.settle)
        ok = not err
    end
    if not ok then
        sock:close()
        return nil, "connect: " .. err
    end
    local answer, stays
    answer, err, stays = exchange(sock, call, deadline)
    if answer and stays then
        sock:setkeepalive(KEEPALIVE_MS, POOL_SIZE)
    else
        sock:close()
    end
    return answer, err
end

return _M
