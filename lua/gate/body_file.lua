-- The file that has the current request's body. A body that nginx read by itself, on the way to a
-- replica, has a file without a name: that is found among the open files of this process.
-- Per worker: the descriptors of such files, as of the last search.

local ffi = require "ffi"

local C = ffi.C
local io_open = io.open
local tonumber = tonumber

local SLASH = 47
local FIRST_FD = 3
local GAP = 1000 -- descriptors are given out lowest first: behind so many free ones comes no other
local SIZE = 4096
local NAMELESS = " (deleted)"

local link = ffi.new("char[?]", SIZE)
local descriptors = {} -- name → descriptor

ffi.cdef [[
long readlink(const char *path, char *buffer, size_t size);
]]

local _M = {}

-- What a descriptor's file was called, if it has no name any more
local function nameless(fd)
    local n = tonumber(C.readlink("/proc/self/fd/" .. fd, link, SIZE))
    if n > 0 and link[0] == SLASH then
        local name = ffi.string(link, n)
        return true, name:sub(-#NAMELESS) == NAMELESS and name:sub(1, -#NAMELESS - 1) or nil
    end
    return n > 0, nil
end

local function search()
    descriptors = {}
    local fd, free = FIRST_FD, 0
    while free < GAP do
        local taken, name = nameless(fd)
        free = taken and 0 or free + 1
        if name then
            descriptors[name] = fd
        end
        fd = fd + 1
    end
end

local function descriptor_of(name)
    local fd = descriptors[name]
    if fd then
        local _, called = nameless(fd)
        if called == name then
            return fd
        end
    end
    search()
    return descriptors[name]
end

--- Open the file of the body, which must have been read; nil without a reason when the body is in
--- no file, nil and why when it cannot be opened.
function _M.open()
    local name = ngx.req.get_body_file()
    if not name then
        return nil
    end
    local file, why = io_open(name, "rb")
    local fd = not file and descriptor_of(name)
    if fd then
        file, why = io_open("/proc/self/fd/" .. fd, "rb")
    end
    return file, why
end

return _M
