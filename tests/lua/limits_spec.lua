describe("limits", function()
    local limits, now, counts, rates, tags

    local function read(dict, key)
        return dict[key] or 0
    end

    local function add(dict, key, delta)
        dict[key] = read(dict, key) + delta
        return dict[key]
    end

    before_each(function()
        now, counts, rates, tags = 1000.5, {}, {}, { "1.1", "2.2" }
        package.loaded["gate.clock"] = { now = function() return now end }
        package.loaded["gate.store"] = {
            tag = function() return "1.1" end,
            workers = function() return tags end,
            count = function(key, delta) return add(counts, key, delta) end,
            counted = function(key) return read(counts, key) end,
            sum = function(of, suffix)
                local total = 0
                for _, tag in ipairs(of) do
                    total = total + read(counts, tag .. suffix)
                end
                return total
            end,
            rate = function(key, delta) return add(rates, key, delta) end,
            rated = function(key) return read(rates, key) end,
        }
        package.loaded["gate.limits"] = nil
        limits = require "gate.limits"
    end)

    after_each(function()
        package.loaded["gate.clock"], package.loaded["gate.store"] = nil, nil
        package.loaded["gate.limits"] = nil
    end)

    local function entry(rpm, in_flight)
        local made = { name = "anna", rpm = rpm or 0, in_flight = in_flight or 0 }
        limits.prepare(made)
        return made
    end

    local function use(one)
        local ok, code, facts = limits.take(one)
        if ok then
            limits.give_back(one.name)
        end
        return ok, code, facts
    end

    it("lets no more through within a minute, and says when the next may come", function()
        local one = entry(3)
        assert.is_true(use(one))
        now = 1010.2
        assert.is_true(use(one))
        assert.is_true(use(one))
        local ok, code, facts = use(one)
        assert.is_nil(ok)
        assert.equal("too-many-requests", code)
        -- The first was in second 1000, which counts until 1060 begins.
        assert.near(49.8, facts.estimate, 1e-6)
        assert.equal('"requests";q=3;w=60', facts.headers["RateLimit-Policy"])
        assert.equal('"requests";r=0;t=50', facts.headers["RateLimit"])
        now = 1059.9
        assert.is_nil((use(one)))
        now = 1060
        assert.is_true(use(one))
        assert.is_nil((use(one)))
        now = 1070
        assert.is_true(use(one))
        assert.is_true(use(one))
        assert.is_nil((use(one)))
    end)

    it("refuses without taking anything from the next", function()
        local one = entry(1)
        assert.is_true(use(one))
        for _ = 1, 100 do
            assert.is_nil((use(one)))
        end
        now = now + 60
        assert.is_true(use(one))
        assert.same({ requests = 2, refused = 100, in_flight = 0 }, limits.report(tags, one))
        assert.equal(0, limits.held())
    end)

    it("holds for whatever comes when: at most the limit in any 59 seconds", function()
        math.randomseed(7)
        local one, passed = entry(20), {}
        for _ = 1, 5000 do
            now = now + math.random() * (math.random() < 0.02 and 30 or 0.3)
            local ok, _, facts = use(one)
            if ok then
                passed[#passed + 1] = now
                local early = passed[#passed - 20]
                assert.is_true(not early or now - early > 59)
            else
                assert.is_true(facts.estimate > 0 and facts.estimate <= 60)
                assert.equal(math.ceil(facts.estimate), facts.headers["RateLimit-Reset"])
            end
        end
        assert.is_true(#passed > 100)
    end)

    it("lets the next through at the moment it named", function()
        math.randomseed(11)
        local one = entry(5)
        for _ = 1, 500 do
            now = now + math.random() * 8
            local ok, _, facts = use(one)
            if not ok then
                now = now + math.max(0, facts.estimate - 0.01)
                assert.is_nil((use(one)))
                now = now + 0.02
                assert.is_true(use(one))
            end
        end
    end)

    it("counts what other workers let through, and what was allowed before", function()
        local one = entry(10)
        for _ = 1, 6 do
            assert.is_true(use(one))
        end
        add(rates, one.second_key, 4)
        assert.is_nil((use(one)))
        now = now + 5
        local less = entry(2)
        local _, _, facts = use(less)
        assert.near(54.5, facts.estimate, 1e-6)
    end)

    it("bounds what is in flight over all workers, without a use of the minute", function()
        local one = entry(2, 3)
        add(counts, "2.2:k:anna", 2)
        assert.is_true(limits.take(one))
        local ok, code, facts = limits.take(one)
        assert.is_nil(ok)
        assert.equal("too-many-in-flight", code)
        assert.equal(3, facts.headers["RateLimit-Limit"])
        assert.equal('"requests";q=2;w=60, "in-flight";q=3;qu="concurrent-requests"',
            facts.headers["RateLimit-Policy"])
        assert.equal(1, limits.held())
        limits.give_back("anna")
        assert.is_true(limits.take(one))
        assert.same({ requests = 2, refused = 1, in_flight = 3 }, limits.report(tags, one))
        limits.give_back("anna")
        assert.equal(0, limits.held())
    end)

    it("has nothing to tell of a key that was never used", function()
        assert.is_nil(limits.report(tags, entry()))
    end)
end)
