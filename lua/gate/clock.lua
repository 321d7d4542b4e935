-- The monotonic clock of the machine: every age the gate reports is a difference of its readings,
-- so stepping the wall clock moves no timeout. No state.

local ffi = require "ffi"

local C = ffi.C

local CLOCK_MONOTONIC = 1

ffi.cdef [[
typedef struct { long seconds; long nanoseconds; } slurmgate_timespec;
int clock_gettime(int clock, slurmgate_timespec *out);
]]

local reading = ffi.new("slurmgate_timespec")

local _M = {}

--- Seconds since some fixed moment, the same for all processes of this machine.
function _M.now()
    C.clock_gettime(CLOCK_MONOTONIC, reading)
    return tonumber(reading.seconds) + tonumber(reading.nanoseconds) * 1e-9
end

return _M
