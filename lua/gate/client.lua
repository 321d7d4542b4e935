-- What the kernel knows of a client's connection.
--
-- Whether the client of the current request has hung up: nginx tells a waiting request only of an
-- end of connection that comes after the wait began: the event of an earlier one, say right behind
-- the last byte of a body, is spent; and it sees no end behind bytes nobody has read, such as the
-- client's next request. So whoever waits asks the kernel, when it begins and now and then.
-- No state.
--
-- Reads the first fields of nginx's request and connection, which have had their places since 0.7.

local base = require "resty.core.base"
local ffi = require "ffi"

local C = ffi.C

local SIGNATURE = 0x50545448 -- "HTTP", at the beginning of every request
local IPPROTO_TCP, TCP_INFO = 6, 11
local ESTABLISHED = 1
local LAST_RECEIVED, INFO_SIZE = 13, 14 -- among its numbers of 32 bits: milliseconds since
local MSG_PEEK, MSG_DONTWAIT = 0x02, 0x40

ffi.cdef [[
typedef struct { void *data; void *read; void *write; int fd; } sg_connection_t;
typedef struct { uint32_t signature; sg_connection_t *connection; } sg_request_t;
long recv(int fd, void *buffer, size_t size, int flags);
int getsockopt(int fd, int level, int name, void *value, uint32_t *length);
]]

local info = ffi.new("uint8_t[1]")
local numbers = ffi.new("uint32_t[?]", INFO_SIZE)
local length = ffi.new("uint32_t[1]")

local _M = {}

--- Whether the connection was closed or half closed; false where that cannot be known.
function _M.gone()
    local request = ffi.cast("sg_request_t *", base.get_request())
    if request == nil or request.signature ~= SIGNATURE then
        return false
    end
    length[0] = 1
    local fd = request.connection.fd
    if C.getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, length) == 0 then
        return info[0] ~= ESTABLISHED
    end
    -- A unix socket: the gate itself, which sends nothing behind its request.
    return C.recv(fd, info, 1, MSG_PEEK + MSG_DONTWAIT) == 0
end

--- Seconds since the last byte came on the connection of a request, which is nginx's own; nil where
--- that cannot be known.
function _M.silent_for(nginx_request)
    local request = ffi.cast("sg_request_t *", nginx_request)
    length[0] = INFO_SIZE * 4
    if request.signature ~= SIGNATURE
        or C.getsockopt(request.connection.fd, IPPROTO_TCP, TCP_INFO, numbers, length) ~= 0
        or length[0] < INFO_SIZE * 4 then
        return nil
    end
    return numbers[LAST_RECEIVED] / 1000
end

return _M
