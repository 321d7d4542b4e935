local picker = require "gate.picker"

local function load(candidate)
    return candidate.load
end

describe("least", function()
    it("gives nothing out of nothing", function()
        assert.is_nil(picker.least({}, load, 1))
    end)

    it("takes the least loaded, whoever's turn it is", function()
        local idle = { load = 0 }
        local candidates = { { load = 3 }, idle, { load = 1 } }
        for turn = 0, 5 do
            assert.are.equal(idle, picker.least(candidates, load, turn))
        end
    end)

    it("lets equals take turns", function()
        local candidates = { { load = 2 }, { load = 2 }, { load = 2 } }
        local taken = {}
        for turn = 1, 3 do
            taken[picker.least(candidates, load, turn)] = true
        end
        for _, candidate in ipairs(candidates) do
            assert.is_true(taken[candidate])
        end
    end)
end)
