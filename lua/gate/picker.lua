-- Choose a replica. Pure: loads without nginx, has no state.
--
-- A candidate has an `id` and a `capacity`: the number of requests it takes at once, 0 without a
-- bound; among candidates either all have one or none. `loads` maps ids to requests in flight.
--
-- Affinity is consistent hashing with bounded loads: each replica owns many points of a ring, and a
-- key belongs to the owner of the first point from its place on, so that a replica that comes or
-- goes moves only its own share of the keys.

local ceil = math.ceil
local floor = math.floor
local huge = math.huge
local ipairs = ipairs
local max = math.max
local sort = table.sort

local POINTS = 128   -- of each replica; a multiple of four
local OVER_MEAN = 1.25
local ALWAYS = 2     -- requests in flight that are never too many: one may have ended a moment ago

local _M = {}

-- A full candidate comes out at one or more, so it is chosen only when all are full.
local function relative(candidate, loads)
    local load, capacity = loads[candidate.id], candidate.capacity
    return capacity > 0 and load / capacity or load
end

--- The candidate with the fewest requests in flight relative to its capacity. `turn` (any whole
--- number from 0) says which of equal ones. Returns nil when there is no candidate.
function _M.least(candidates, loads, turn)
    local n = #candidates
    local lowest, equals = huge, 0
    for i = 1, n do
        local its = relative(candidates[i], loads)
        if its < lowest then
            lowest, equals = its, 1
        elseif its == lowest then
            equals = equals + 1
        end
    end
    local nth = equals > 0 and turn % equals or 0
    for i = 1, n do
        if relative(candidates[i], loads) == lowest then
            if nth == 0 then
                return candidates[i]
            end
            nth = nth - 1
        end
    end
    return nil
end

local function before(a, b)
    if a.place ~= b.place then
        return a.place < b.place
    end
    return a.id < b.id
end

--- A ring of replicas by their ids; `digest(text)` gives at least 16 well-mixed bytes.
function _M.ring(ids, digest)
    local points = {}
    for _, id in ipairs(ids) do
        for part = 1, POINTS / 4 do
            local bytes = digest(id .. ":" .. part)
            for at = 1, 13, 4 do
                local a, b, c, d = bytes:byte(at, at + 3)
                points[#points + 1] = { place = ((a * 256 + b) * 256 + c) * 256 + d, id = id }
            end
        end
    end
    sort(points, before)
    local ring = { places = {}, owners = {} }
    for i, point in ipairs(points) do
        ring.places[i], ring.owners[i] = point.place, point.id
    end
    return ring
end

-- Index of the first point at a place or behind it; the first of all follows the last.
local function first_from(places, place)
    local low, high = 1, #places + 1
    while low < high do
        local middle = floor((low + high) / 2)
        if places[middle] < place then
            low = middle + 1
        else
            high = middle
        end
    end
    return low <= #places and low or 1
end

-- Total load and total weight; without bounds all weigh the same.
local function totals(candidates, loads)
    local load, weight = 0, 0
    for i = 1, #candidates do
        local capacity = candidates[i].capacity
        load = load + loads[candidates[i].id]
        weight = weight + (capacity > 0 and capacity or 1)
    end
    return load, weight
end

local function with_id(candidates, id)
    for i = 1, #candidates do
        if candidates[i].id == id then
            return candidates[i]
        end
    end
    return nil
end

--- The candidate a key stays with: the first owner from its place (0 to 2^32 - 1) on the ring that
--- is a candidate, not full, and with one request more not above 1.25 times the mean, in whole
--- requests. Returns nil when all are full.
function _M.affine(ring, place, candidates, loads)
    local total, weight = totals(candidates, loads)
    local owners = ring.owners
    local at = first_from(ring.places, place)
    local seen
    for _ = 1, #owners do
        local id = owners[at]
        local candidate = id ~= seen and loads[id] and with_id(candidates, id)
        if candidate then
            local load, capacity = loads[id], candidate.capacity
            local its_weight = capacity > 0 and capacity or 1
            local bound = ceil(OVER_MEAN * (total + 1) * its_weight / weight)
            if load + 1 <= max(bound, ALWAYS) and (capacity == 0 or load < capacity) then
                return candidate
            end
        end
        seen = id
        at = at < #owners and at + 1 or 1
    end
    return nil
end

return _M
