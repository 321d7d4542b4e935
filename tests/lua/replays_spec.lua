describe("replays", function()
    local replays, now, times, service, slept, on_sleep
    local real_ngx = _G.ngx

    local function replica(id, changes)
        local one = { id = id, gen = 1, phase = "ready", answered = 0, service = service }
        for name, value in pairs(changes or {}) do
            one[name] = value
        end
        return one
    end

    before_each(function()
        now, times, slept = 1000, {}, {}
        on_sleep = function() end
        service = {
            name = "llm", broke_key = "broke:llm", routable = {}, health = { timeout = 10 },
        }
        _G.ngx = { sleep = function(seconds)
            assert(#slept < 10000, "it waits for ever")
            slept[#slept + 1] = seconds
            now = now + seconds
            on_sleep()
        end }
        package.loaded["gate.clock"] = { now = function() return now end }
        package.loaded["gate.registry"] = {
            refresh = function() end,
            find = function(name) return service and service.name == name and service or nil end,
        }
        package.loaded["gate.store"] = {
            time = function(key) return times[key] end,
            advance_time = function(key, at)
                if not times[key] or times[key] < at then
                    times[key] = at
                end
            end,
        }
        package.loaded["gate.replays"] = nil
        replays = require "gate.replays"
    end)

    after_each(function()
        for _, name in ipairs({ "clock", "registry", "store", "replays" }) do
            package.loaded["gate." .. name] = nil
        end
        _G.ngx = real_ngx
    end)

    -- How long a request waits whose try broke off now
    local function waits(last)
        local broke = now
        replays.note_break({ broke_key = "broke:llm" }, broke)
        replays.wait("llm", broke, last or math.huge)
        return now - broke
    end

    -- Polls as the leader makes them, all of which these answer
    local function polling(...)
        local answering, began = { ... }, {}
        return function()
            for _, one in ipairs(answering) do
                if replays.poll_due(one, began[one] or 0, now) then
                    began[one] = now
                    replays.answered_poll(one, now)
                end
            end
        end
    end

    it("let a request go on at once when there is nothing to choose from", function()
        assert.equal(0, waits())
        service = nil
        assert.equal(0, waits())
    end)

    it("hold it until all that it may go to have shown that they live", function()
        local a, b = replica("a"), replica("b")
        service.routable = { a, b }
        on_sleep = polling(a, b)
        local waited = waits()
        assert.is_true(waited >= 0.1 and waited < 0.3)
    end)

    it("do not believe what was shown before others may have ended too", function()
        local a = replica("a")
        service.routable = { a }
        replays.answered_poll(a, now + 0.05)
        a.answered = now + 0.25 -- the last words of a long answer may be noted so late
        on_sleep = function()
            if now >= 1002 then
                replays.answered_poll(a, 1001)
            end
        end
        assert.is_true(waits() >= 2)
    end)

    it("believe nothing of another generation", function()
        service.routable = { replica("a", { gen = 2 }) }
        replays.answered_poll(replica("a"), now + 1)
        assert.is_true(waits() >= 10)
    end)

    it("believe answers, of any worker", function()
        local a, b = replica("a"), replica("b")
        service.routable = { a, b }
        on_sleep = function()
            a.answered, times["answered:b"] = now, now
        end
        local waited = waits()
        assert.is_true(waited >= 0.1 and waited < 0.5)
    end)

    it("go on when those that show nothing are suspected", function()
        local a, b = replica("a"), replica("b")
        service.routable = { a, b }
        on_sleep = function()
            service.routable = {}
        end
        assert.is_true(waits() < 0.2)
    end)

    it("wait for one that is mute only a second while another lives", function()
        local a, mute = replica("a"), replica("mute")
        service.routable = { a, mute }
        on_sleep = polling(a)
        local waited = waits()
        assert.is_true(waited >= 1 and waited < 1.1)
    end)

    it("wait for one that is mute as long as a poll may take when there is no other", function()
        service.routable = { replica("mute") }
        local waited = waits()
        assert.is_true(waited >= 10 and waited < 10.3)
    end)

    it("wait no longer than the request may be held", function()
        service.routable = { replica("mute") }
        local waited = waits(now + 0.5)
        assert.is_true(waited >= 0.5 and waited < 0.51)
        assert.equal(0, waits(now - 1))
    end)

    it("ask for a poll at once and when the moment is over, then for none", function()
        local a = replica("a")
        assert.is_false(replays.poll_due(a, 0, now))
        assert.is_false(replays.doubted(a))
        replays.note_break(service, 1000)
        assert.is_true(replays.doubted(a))
        assert.is_true(replays.poll_due(a, 990, 1000.01))
        assert.is_false(replays.poll_due(a, 1000.01, 1000.1))
        assert.is_true(replays.poll_due(a, 1000.01, 1000.12))
        assert.is_false(replays.poll_due(a, 1000.12, 1001))
    end)

    it("ask for no poll of one that starts, or of another service's", function()
        replays.note_break(service, 1000)
        assert.is_false(replays.poll_due(replica("a", { phase = "starting" }), 0, now))
        local other = replica("a", { service = { broke_key = "broke:x" } })
        assert.is_false(replays.poll_due(other, 0, now))
    end)

    it("let breaks without an end neither put polls off nor multiply them", function()
        local a, polls, began = replica("a"), 0, 0
        for i = 0, 1000 do
            now = 1000 + i / 100
            replays.note_break(service, now)
            if replays.poll_due(a, began, now) then
                polls, began = polls + 1, now
            end
        end
        assert.is_true(polls >= 80 and polls <= 101)
    end)
end)
