-- Headers that are for this hop alone, and what else a client must not bring further: looked at
-- once, before anything is decided by them. Refused is what the next reader might read in another
-- way than nginx did. nginx itself refuses the rest: two lengths, a length beside chunks, folded
-- lines, blanks before the colon.
--
-- Per worker: hosts found to be good. Walks nginx's own list, without a Lua string for each header.

local base = require "resty.core.base"
local bit = require "bit"
local ffi = require "ffi"
require "resty.core.request"
require "resty.core.var"

local C = ffi.C
local band = bit.band
local bor = bit.bor
local cast = ffi.cast
local ffi_string = ffi.string
local find = string.find
local get_request = base.get_request
local lower = string.lower
local match = string.match
local sub = string.sub

local LIMIT = 200 -- header lines of a request
local WORDS_LIMIT = 50 -- of its Connection lines
local HOST_LIMIT = 300
local HOSTS_KEPT = 1000
local TAB, NEWLINE, RETURN, SPACE = 9, 10, 13, 32
local X, DASH, S, L, F = 120, 45, 115, 108, 102
local OWN = "x-slurmgate-"
local FORWARDED = "x-forwarded-"
local NO_NAME = "[^%w!#$%%&'*+.^_`|~-]"

-- How a request line may end; the others have lines that can be looked at.
local FRAMED = { ["HTTP/2.0"] = true, ["HTTP/3.0"] = true }
local LINES = { ["HTTP/1.1"] = true, ["HTTP/1.0"] = true }

-- What decides comes once, or another reader may take the other one. By length, because that is
-- known without reading. Of several Connection lines each counts.
local WATCHED = {
    [6] = { name = "origin", bit = 1 },
    [9] = { name = "x-api-key", bit = 2 },
    [10] = { name = "connection", bit = 4 },
    [12] = { name = "content-type", bit = 8 },
    [13] = { name = "authorization", bit = 16 },
    [16] = { name = "content-encoding", bit = 32 },
    [17] = { name = "transfer-encoding", bit = 64 },
}
for _, watched in pairs(WATCHED) do
    watched.first = watched.name:byte()
end

-- Values of Connection that name no header
local PLAIN = {
    ["keep-alive"] = true, ["Keep-Alive"] = true, ["close"] = true, ["Close"] = true,
    ["upgrade"] = true, ["Upgrade"] = true, ["keep-alive, Upgrade"] = true, [""] = true,
}
-- Words in it that are no names, or of headers that go no further anyway
local WORDS = {
    ["keep-alive"] = true, ["close"] = true, ["upgrade"] = true, ["te"] = true,
}
-- Without these a request is another one.
local NEEDED = { ["host"] = true, ["content-length"] = true, ["transfer-encoding"] = true }

-- Whoever takes other bytes for dashes would take a name like these for one that decides.
local MISTAKABLE = {
    ["host"] = true, ["content-length"] = true, ["upgrade"] = true, ["expect"] = true,
}
for _, watched in pairs(WATCHED) do
    MISTAKABLE[watched.name] = true
end

-- What only HTTP/1 has
local OF_LINES = { ["connection"] = true, ["transfer-encoding"] = true }

-- What nginx says of the way of a request itself, in their place
local SAID = {
    ["x-forwarded-for"] = true, ["x-forwarded-proto"] = true, ["x-forwarded-host"] = true,
}

-- What a walk finds, above the bits of what it has seen
local GATES, NAMES, GAP, WAY = 128, 256, 512, 1024

local NO_LINE = "A header line has no colon, or no proper end."
local NOT_FRAMED = "HTTP/2 has no header '%s'."
local TWICE = "The header '%s' was sent twice."

local lines = ffi.new("ngx_http_lua_ffi_table_elt_t[?]", LIMIT)
local truncated = ffi.new("int[1]")
local bytes_t = ffi.typeof("const unsigned char *")
local NOWHERE = ffi.new("const unsigned char *")
local lowcase = ffi.new("char[?]", #"request")
local text = ffi.new("char *[1]")
local length = ffi.new("size_t[1]")
local unknown = ffi.new("char *[1]")
local hosts = {} -- Host header → the host nginx found
local hosts_kept = 0

local _M = { TOO_MANY = "The request has more header lines than this gate takes." }

local function lower_byte(byte)
    return bor(byte, 32)
end

-- Where the line after a line ends whose value has blanks behind it; nil if not in CR and LF.
local function skip_blanks(at)
    while at[0] == SPACE or at[0] == TAB or at[0] == RETURN do
        at = at + 1
    end
    return at[0] == NEWLINE and at + 1 or nil
end

-- Where the first line of HTTP/1 begins if nginx has left none out before it.
local function behind_request_line(request)
    if C.ngx_http_lua_ffi_var_get(request, "request", #"request", lowcase, 0, text, length,
        unknown) ~= 0 then
        return NOWHERE
    end
    return cast(bytes_t, text[0]) + length[0] + 2
end

-- What is wrong with the name of a line that nginx did not take: it leaves names out without a word
-- that have other bytes than letters, digits and dashes.
local function name_problem(name)
    if name == "" or find(name, NO_NAME) then
        return "A header line has no proper name."
    end
    local alike = lower(name):gsub("%W", "-")
    if alike ~= lower(name) and (MISTAKABLE[alike] or sub(alike, 1, #OWN) == OWN) then
        return "A header's name can be mistaken for '" .. alike .. "'."
    end
    return nil
end

local function problem_of_hidden()
    for line in ngx.req.raw_header(true):gmatch("([^\r\n]+)\r?\n") do
        local problem = name_problem(match(line, "^[^:]*"))
        if problem then
            return problem
        end
    end
    return nil
end

local function is_own(name, size)
    return size > #OWN and lower_byte(name[0]) == X and name[1] == DASH
        and lower_byte(name[2]) == S and lower_byte(name[3]) == L
        and lower(ffi_string(name, #OWN)) == OWN
end

-- One of the headers by which proxies tell where a request came from and who sent it.
local function is_of_the_way(name, size)
    if size <= #FORWARDED or lower_byte(name[0]) ~= X or name[1] ~= DASH
        or lower_byte(name[2]) ~= F then
        return false
    end
    local header = lower(ffi_string(name, size))
    return sub(header, 1, #FORWARDED) == FORWARDED and not SAID[header]
end

local function drop(count, is_one)
    local names = {}
    for i = 0, count - 1 do
        local key = lines[i].key
        if is_one(key.data, key.len) then
            names[#names + 1] = ffi_string(key.data, key.len)
        end
    end
    for _, name in ipairs(names) do
        ngx.req.clear_header(name)
    end
end

--- Take the headers away that Connection names; returns what is wrong with it, or nil.
function _M.strip()
    local values = ngx.req.get_headers(0)["connection"]
    values = type(values) == "table" and table.concat(values, ",") or values or ""
    local words = 0
    for word in values:gmatch("[^, \t]+") do
        word, words = lower(word), words + 1
        if words > WORDS_LIMIT then
            return "Connection names more headers than this gate takes."
        end
        if NEEDED[word] then
            return ("Connection must not name '%s'."):format(word)
        elseif not WORDS[word] and not find(word, NO_NAME) then
            ngx.req.clear_header(word)
        end
    end
    return nil
end

-- What stands in a request line and in Host, if both do, must be the same.
local function host_problem(sent, found)
    local name, port = match(sent, "^([%w._~-]+):?(%d*)$")
    if not name then
        name, port = match(sent, "^(%[[%x:.]+%]):?(%d*)$")
    end
    if not name or #sent > HOST_LIMIT or #port > 5 or (tonumber(port) or 0) > 65535 then
        return "The Host header is no host."
    elseif lower(name):gsub("%.$", "") ~= found then
        return "The Host header and the request line name different hosts."
    end
    if hosts_kept >= HOSTS_KEPT then
        hosts, hosts_kept = {}, 0
    end
    hosts[sent] = found
    hosts_kept = hosts_kept + 1
    return nil
end

-- One walk over the lines; `after` is where the next one begins, NOWHERE for other than HTTP/1.
-- Returns what is wrong, or nil and marks of what is to be done. Numbers and pointers only: values
-- that change their type would not be compiled. nginx has put a zero behind each value, in place of
-- the first byte of its end.
local function walk(count, after)
    local in_lines, marks = after ~= NOWHERE, 0
    for i = 0, count - 1 do
        local line = lines[i]
        local name, size = line.key.data, line.key.len
        if in_lines then
            -- A gap may also be one between two buffers.
            if name ~= after then
                marks = bor(marks, GAP)
            end
            local value = line.value.data
            after = value + line.value.len + 2
            if after[-1] ~= NEWLINE then
                after = skip_blanks(after - 1)
            end
            if not after or value == name + size then
                return NO_LINE
            end
        end
        local watched = WATCHED[size]
        if watched and lower_byte(name[0]) == watched.first
            and lower(ffi_string(name, size)) == watched.name then
            local again = band(marks, watched.bit) ~= 0
            if not in_lines and OF_LINES[watched.name] then
                return NOT_FRAMED:format(watched.name)
            elseif watched.name ~= "connection" then
                if again then
                    return TWICE:format(watched.name)
                end
            elseif again or not PLAIN[ffi_string(line.value.data, line.value.len)] then
                marks = bor(marks, NAMES)
            end
            marks = bor(marks, watched.bit)
        elseif is_own(name, size) then
            marks = bor(marks, GATES)
        elseif is_of_the_way(name, size) then
            marks = bor(marks, WAY)
        end
    end
    if in_lines and after[0] ~= RETURN then
        marks = bor(marks, GAP)
    end
    return nil, marks
end

-- What a walk found is looked at more closely, and taken away.
local function clear(var, count, marks)
    if band(marks, WAY) ~= 0 and var.sg_trusted ~= "1" then
        drop(count, is_of_the_way)
    end
    if band(marks, GATES) ~= 0 then
        drop(count, is_own)
    end
    return band(marks, GAP) ~= 0 and problem_of_hidden()
        or band(marks, NAMES) ~= 0 and _M.strip() or nil
end

--- Look at the header of the current request, and take away what goes no further. Returns what
--- is wrong with it, or nil.
function _M.examine(var)
    local protocol = var.server_protocol
    local in_lines = LINES[protocol]
    if not in_lines and not FRAMED[protocol] then
        return "The gate speaks HTTP/1.0, HTTP/1.1 and HTTP/2."
    end
    local request = get_request()
    local count = C.ngx_http_lua_ffi_req_get_headers_count(request, LIMIT, truncated)
    if truncated[0] ~= 0 then
        return _M.TOO_MANY
    end
    C.ngx_http_lua_ffi_req_get_headers(request, lines, count, 1)
    -- What is behind the walk is not compiled: all that reads comes before.
    local sent, found = var.http_host, var.host
    local problem, marks = walk(count, in_lines and behind_request_line(request) or NOWHERE)
    if not problem and sent and hosts[sent] ~= found then
        problem = host_problem(sent, found)
    end
    if not problem and marks >= GATES then
        problem = clear(var, count, marks)
    end
    return problem
end

return _M
