-- Choose a replica. Pure: loads without nginx, has no state.

local _M = {}

--- The candidate with the fewest requests in flight; equal ones take turns by `turn` (any number
--- that changes). `load(candidate)` gives the number. Returns nil when there is no candidate.
function _M.least(candidates, load, turn)
    local n = #candidates
    local best, best_load
    for step = 0, n - 1 do
        local candidate = candidates[(turn + step) % n + 1]
        local its_load = load(candidate)
        if not best or its_load < best_load then
            best, best_load = candidate, its_load
        end
    end
    return best
end

return _M
