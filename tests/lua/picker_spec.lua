local picker = require "gate.picker"

local SPAN = 2 ^ 32

-- Candidates a, b, c … with these loads, all of one capacity.
local function fleet(its_loads, capacity)
    local candidates, loads = {}, {}
    for i, load in ipairs(its_loads) do
        local id = string.char(96 + i)
        candidates[i] = { id = id, capacity = capacity or 0 }
        loads[id] = load
    end
    return candidates, loads
end

-- Sixteen bytes of a small generator: mixed well enough, and the same on every machine.
local function digest(text)
    local state = 17
    local bytes = {}
    for at = 1, #text do
        state = (state * 31 + text:byte(at)) % 2147483647
    end
    for i = 1, 16 do
        for _ = 1, 3 do
            state = state * 16807 % 2147483647
        end
        bytes[i] = string.char(math.floor(state / 128) % 256)
    end
    return table.concat(bytes)
end

local function ids_of(candidates)
    local ids = {}
    for i, candidate in ipairs(candidates) do
        ids[i] = candidate.id
    end
    return ids
end

-- Owners of many keys, nothing loaded.
local function owners(ring, candidates, loads, keys)
    local result = {}
    for key = 1, keys do
        result[key] = picker.affine(ring, (key - 0.5) / keys * SPAN, candidates, loads).id
    end
    return result
end

describe("least", function()
    it("gives nothing out of nothing", function()
        assert.is_nil(picker.least({}, {}, 1))
    end)

    it("takes the least loaded, whoever's turn it is", function()
        local candidates, loads = fleet { 3, 0, 1 }
        for turn = 0, 5 do
            assert.are.equal("b", picker.least(candidates, loads, turn).id)
        end
    end)

    it("lets equals take turns, evenly even beside others", function()
        local candidates, loads = fleet { 0, 1, 0, 0, 1 }
        local taken = { a = 0, c = 0, d = 0 }
        for turn = 1, 30 do
            local id = picker.least(candidates, loads, turn).id
            taken[id] = taken[id] + 1
        end
        assert.are.same({ a = 10, c = 10, d = 10 }, taken)
    end)

    it("goes by load relative to capacity", function()
        local candidates, loads = fleet { 3, 2 }
        candidates[1].capacity, candidates[2].capacity = 8, 4
        assert.are.equal("a", picker.least(candidates, loads, 1).id)
    end)

    it("takes a full one only when all are full", function()
        local candidates, loads = fleet { 1, 7 }
        candidates[1].capacity, candidates[2].capacity = 1, 8
        assert.are.equal("b", picker.least(candidates, loads, 1).id)
        loads.b = 9
        assert.are.equal("a", picker.least(candidates, loads, 1).id)
    end)
end)

describe("affine", function()
    it("keeps a key where it is", function()
        local candidates, loads = fleet { 0, 0, 0, 0 }
        local ring = picker.ring(ids_of(candidates), digest)
        local once = owners(ring, candidates, loads, 500)
        assert.are.same(once, owners(ring, candidates, loads, 500))
    end)

    it("divides the keys within reason", function()
        local candidates, loads = fleet { 0, 0, 0, 0 }
        local ring = picker.ring(ids_of(candidates), digest)
        local share = { a = 0, b = 0, c = 0, d = 0 }
        for _, id in ipairs(owners(ring, candidates, loads, 4000)) do
            share[id] = share[id] + 1
        end
        for id, n in pairs(share) do
            assert.is_true(n > 650 and n < 1350, id .. " has " .. n .. " of 4000")
        end
    end)

    it("moves only the keys of a replica that leaves", function()
        local candidates, loads = fleet { 0, 0, 0, 0 }
        local before = owners(picker.ring(ids_of(candidates), digest), candidates, loads, 2000)
        table.remove(candidates, 2)
        local after = owners(picker.ring(ids_of(candidates), digest), candidates, loads, 2000)
        for key, id in ipairs(before) do
            if id ~= "b" then
                assert.are.equal(id, after[key])
            end
        end
    end)

    it("moves as little while a replica is out of the choice", function()
        local candidates, loads = fleet { 0, 0, 0, 0 }
        local ring = picker.ring(ids_of(candidates), digest)
        local before = owners(ring, candidates, loads, 2000)
        table.remove(candidates, 3)
        loads.c = nil
        local without = owners(ring, candidates, loads, 2000)
        local left = {}
        for key, id in ipairs(before) do
            if id == "c" then
                left[without[key]] = true
            else
                assert.are.equal(id, without[key])
            end
        end
        assert.are.same({ a = true, b = true, d = true }, left)
    end)

    it("finds an owner from every place", function()
        local candidates, loads = fleet { 0, 0 }
        local ring = picker.ring(ids_of(candidates), digest)
        for _, place in ipairs { 0, ring.places[1], ring.places[#ring.places], SPAN - 1 } do
            assert.is_truthy(picker.affine(ring, place, candidates, loads))
        end
    end)

    it("lets no replica rise above 1.25 times the mean, whatever the keys", function()
        math.randomseed(4)
        for n = 2, 7 do
            local zeros = {}
            for i = 1, n do
                zeros[i] = 0
            end
            local candidates, loads = fleet(zeros)
            local ring = picker.ring(ids_of(candidates), digest)
            local keys, under_way = math.random(1, 40), {}
            for _ = 1, 1000 do
                if #under_way > 0 and math.random() < 0.48 then
                    local id = table.remove(under_way, math.random(#under_way))
                    loads[id] = loads[id] - 1
                else
                    local place = math.random(keys) / (keys + 1) * SPAN
                    local id = picker.affine(ring, place, candidates, loads).id
                    under_way[#under_way + 1] = id
                    loads[id] = loads[id] + 1
                    local bound = math.max(2, math.ceil(1.25 * #under_way / n))
                    assert.is_true(loads[id] <= bound)
                end
            end
        end
    end)

    it("does not move a session for one request that is about to end", function()
        local candidates, loads = fleet { 0, 0, 0, 0 }
        local ring = picker.ring(ids_of(candidates), digest)
        local first = picker.affine(ring, 12345, candidates, loads).id
        loads[first] = 1
        assert.are.equal(first, picker.affine(ring, 12345, candidates, loads).id)
        loads[first] = 2
        assert.are_not.equal(first, picker.affine(ring, 12345, candidates, loads).id)
    end)

    it("goes on to the same second replica for the same key", function()
        local candidates, loads = fleet { 0, 0, 0 }
        local ring = picker.ring(ids_of(candidates), digest)
        local first = picker.affine(ring, 12345, candidates, loads).id
        loads[first] = 10
        local second = picker.affine(ring, 12345, candidates, loads).id
        assert.are_not.equal(first, second)
        assert.are.equal(second, picker.affine(ring, 12345, candidates, loads).id)
    end)

    it("passes over full ones, and gives none when all are", function()
        local candidates, loads = fleet({ 2, 2, 0 }, 2)
        local ring = picker.ring(ids_of(candidates), digest)
        for _, id in ipairs(owners(ring, candidates, loads, 100)) do
            assert.are.equal("c", id)
        end
        loads.c = 2
        assert.is_nil(picker.affine(ring, 1, candidates, loads))
    end)
end)
