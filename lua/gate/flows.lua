-- Which requests under way bring bytes of an answer: a replica that still writes long answers is
-- alive, whatever its health path says. A body filter would tell that at the price of some percent
-- of a warm request, and nothing of changed protocols (websockets), which pass no filter. So each
-- worker notes its requests, and looks now and then how far nginx has come with those that last.
--
-- Per worker: the replica of each request under way, by the address of nginx's request, the bytes
-- that had come from it at the last look, and whether it is left out of the counts while its client
-- is silent. A request is valid until its log phase, which nginx never leaves out; it is forgotten
-- there before all else.

local base = require "resty.core.base"
local ffi = require "ffi"

local C = ffi.C
local cast = ffi.cast
local get_request = base.get_request
local next = next
local tonumber = tonumber

local RECEIVED = "upstream_bytes_received"
local NAME_LIMIT, PROBLEM_LIMIT = 64, 256
local OK = 0

local under_way = {} -- address → replica
local received = {}  -- address → bytes at the last look
local began = {}     -- address → when it was sent, of those that may be left out
local parked = {}    -- address → whether it was counted as a use before

local request_t = ffi.typeof("ngx_http_request_t *")
local address_t = ffi.typeof("uintptr_t")
local lowcase = ffi.new("unsigned char[?]", NAME_LIMIT)
local value = ffi.new("char *[1]")
local length = ffi.new("size_t[1]")
local problem = ffi.new("char *[1]")
local problem_text = ffi.new("unsigned char[?]", PROBLEM_LIMIT)

local _M = {}

local function address()
    return tonumber(cast(address_t, get_request()))
end

--- The current request is sent to a replica.
function _M.begin(replica)
    local at = address()
    under_way[at] = replica
    received[at] = nil
end

--- The same, with the time, for one that may be left out of the counts.
function _M.begin_at(replica, now)
    _M.begin(replica)
    began[address()] = now
end

--- The current request is on no replica any more.
function _M.finish()
    local at = address()
    under_way[at] = nil
    received[at] = nil
    began[at] = nil
    parked[at] = nil
end

--- Address and replica of each request under way, for a loop.
function _M.all()
    return next, under_way
end

--- When the request at an address was sent; nil if nobody wanted to know then.
function _M.began(at)
    return began[at]
end

--- Note whether the request at an address is left out of the counts; `use` says whether it is a use
--- when it is not, nil that it is counted.
function _M.park(at, use)
    parked[at] = use
end

--- Whether the request at an address is left out (nil: no), and then whether it was a use.
function _M.parked(at)
    return parked[at]
end

--- Whether any request is left out.
function _M.any_parked()
    return next(parked) ~= nil
end

--- The request at an address of `all`, as nginx's own type; valid within the loop.
function _M.request(at)
    return cast(request_t, cast(address_t, at))
end

--- An nginx variable of the request at an address; nil if it has none.
function _M.read(at, name)
    local code = C.ngx_http_lua_ffi_var_get(
        _M.request(at), name, #name, cast("char *", lowcase), 0, value, length, problem)
    if code ~= OK then
        return nil
    end
    return ffi.string(value[0], length[0])
end

--- Set an nginx variable of the request at an address.
function _M.write(at, name, text)
    length[0] = PROBLEM_LIMIT
    local code = C.ngx_http_lua_ffi_var_set(
        _M.request(at), name, #name, lowcase, text, #text, problem_text, length)
    if code ~= OK then
        error("set " .. name .. ": " .. ffi.string(problem_text, length[0]))
    end
end

-- Bytes that came for a request in its last try; nil before there was any.
local function bytes_of(at)
    local text = _M.read(at, RECEIVED)
    return text and tonumber(text:match("(%d+)$"))
end

--- Call `moved(replica)` for each replica that bytes came from since the last look. Replicas for
--- which `needless(replica)` holds are passed over.
function _M.look(needless, moved)
    for at, replica in next, under_way do
        if not needless(replica) then
            local bytes = bytes_of(at)
            if bytes and bytes > (received[at] or 0) then
                received[at] = bytes
                moved(replica)
            end
        end
    end
end

return _M
