local prefer = require "gate.prefer"

describe("a wait", function()
    for text, seconds in pairs {
        ["wait=5"] = 5, ["Wait = 0"] = 0, ['wait="7"'] = 7, ["respond-async, wait=10"] = 10,
        ["wait=3;x=y, foo"] = 3, ['wait="3" ; x'] = 3, ['foo="a, wait=9", wait=0'] = 0,
        ['foo="a\\", wait=9", wait=1'] = 1, ["wait=0.2, wait=4"] = 4, [", wait=2,"] = 2,
    } do
        it("is found in " .. text, function()
            assert.are.equal(seconds, prefer.wait(text))
        end)
    end

    for _, text in ipairs {
        "", "wait", "wait=", "wait=0.2", "wait=-1", "wait=1s", "wait=x", 'wait="1', "waiting=1",
        'foo="wait=1"', 'foo="a, wait=1', 'foo="\\', "foo; wait=1", "wait=1 2",
    } do
        it("is not found in " .. text, function()
            assert.is_nil(prefer.wait(text))
        end)
    end
end)
