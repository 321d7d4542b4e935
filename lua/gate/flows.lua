-- Which requests under way bring bytes of an answer: a replica that still writes long answers is
-- alive, whatever its health path says. A body filter would tell that at the price of some percent
-- of a warm request, and nothing of changed protocols (websockets), which pass no filter. So each
-- worker notes its requests, and looks now and then how far nginx has come with those that last.
--
-- Per worker: the replica of each request under way, by the address of nginx's request, and the
-- bytes that had come from it at the last look. A request is valid until its log phase, which nginx
-- never leaves out; it is forgotten there before all else.

local base = require "resty.core.base"
local ffi = require "ffi"

local C = ffi.C
local cast = ffi.cast
local get_request = base.get_request
local next = next
local tonumber = tonumber

local RECEIVED = "upstream_bytes_received"
local OK = 0

local under_way = {} -- address → replica
local received = {}  -- address → bytes at the last look

local request_t = ffi.typeof("ngx_http_request_t *")
local address_t = ffi.typeof("uintptr_t")
local lowcase = ffi.new("char[?]", #RECEIVED)
local value = ffi.new("char *[1]")
local length = ffi.new("size_t[1]")
local problem = ffi.new("char *[1]")

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

--- The current request is on no replica any more.
function _M.finish()
    local at = address()
    under_way[at] = nil
    received[at] = nil
end

-- Bytes that came for a request in its last try; nil before there was any.
local function bytes_of(at)
    local request = cast(request_t, cast(address_t, at))
    local code = C.ngx_http_lua_ffi_var_get(
        request, RECEIVED, #RECEIVED, lowcase, 0, value, length, problem)
    if code ~= OK then
        return nil
    end
    return tonumber(ffi.string(value[0], length[0]):match("(%d+)$"))
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
