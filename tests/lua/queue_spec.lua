local queue = require "gate.queue"

local function waiter(number)
    return { number = number, ticket = tostring(number) }
end

local function of(...)
    local made = queue.new()
    for _, number in ipairs { ... } do
        queue.add(made, waiter(number))
    end
    return made
end

local function numbers(made)
    local forward, backward = {}, {}
    local one = made.first
    while one do
        forward[#forward + 1] = one.number
        one = one.after
    end
    one = made.last
    while one do
        table.insert(backward, 1, one.number)
        one = one.before
    end
    assert.same(forward, backward)
    assert.equal(#forward, made.size)
    return forward
end

local function turns(made, lists, free)
    local visited = {}
    queue.turns(made, lists, free, function(one)
        visited[#visited + 1] = one.number
    end)
    return visited
end

describe("queue", function()
    it("keeps the order of the tickets, whatever the order of coming", function()
        assert.same({ 1, 2, 3 }, numbers(of(1, 2, 3)))
        assert.same({ 1, 2, 3, 4, 5, 9 }, numbers(of(3, 9, 1, 4, 2, 5)))
        assert.same({ 1, 2, 50, 99, 100 }, numbers(of(1, 100, 2, 99, 50)))
    end)

    it("lets anyone go", function()
        local made = queue.new()
        local all = {}
        for number = 1, 5 do
            all[number] = waiter(number)
            queue.add(made, all[number])
        end
        queue.remove(made, all[3])
        assert.same({ 1, 2, 4, 5 }, numbers(made))
        queue.remove(made, all[1])
        queue.remove(made, all[5])
        assert.same({ 2, 4 }, numbers(made))
        queue.add(made, all[3])
        assert.same({ 2, 3, 4 }, numbers(made))
        for number = 2, 4 do
            queue.remove(made, all[number])
        end
        assert.same({}, numbers(made))
    end)

    it("stays in order through any coming and going", function()
        math.randomseed(4711)
        local made, inside = queue.new(), {}
        for _ = 1, 2000 do
            local number = math.random(60)
            if inside[number] then
                queue.remove(made, inside[number])
                inside[number] = nil
            else
                inside[number] = waiter(number)
                queue.add(made, inside[number])
            end
            local wanted = {}
            for n = 1, 60 do
                wanted[#wanted + 1] = inside[n] and n
            end
            assert.same(wanted, numbers(made))
        end
    end)

    it("shows its first ones", function()
        assert.is_nil(queue.heads(queue.new(), 3))
        local text, last = queue.heads(of(2, 4), 3)
        assert.same({ "2 4", 4 }, { text, last })
        text, last = queue.heads(of(2, 4, 6, 8), 3)
        assert.same({ "2 4 6+", 6 }, { text, last })
        assert.same({ 2, 4, 6, more = true }, queue.parse(text))
        assert.same({ 7, more = false }, queue.parse("7"))
    end)

    it("gives what is free to the first of all queues", function()
        local lists = { { 1, 4, 5 }, { 3, 8 } }
        assert.same({}, turns(of(2, 6, 7), lists, 1))
        assert.same({ 2 }, turns(of(2, 6, 7), lists, 2))
        assert.same({ 2 }, turns(of(2, 6, 7), lists, 5))
        assert.same({ 2, 6 }, turns(of(2, 6, 7), lists, 6))
        assert.same({ 2, 6, 7 }, turns(of(2, 6, 7), {}, math.huge))
        assert.same({}, turns(queue.new(), lists, 5))
    end)

    it("waits where others show only the first of theirs", function()
        local lists = { { 1, 4, more = true } }
        assert.same({ 2, 3 }, turns(of(2, 3, 5), lists, 100))
        assert.same({}, turns(of(5), lists, 100))
    end)

    it("lets a visitor take itself out", function()
        local made = of(1, 2, 3)
        queue.turns(made, {}, 2, function(one)
            queue.remove(made, one)
        end)
        assert.same({ 3 }, numbers(made))
    end)

    it("knows whether its first is among the first of all", function()
        assert.is_true(queue.among_first(of(2, 9), { { 3 }, { 4, 5 } }, 1))
        assert.is_false(queue.among_first(of(4), { { 3 }, { 5 } }, 1))
        assert.is_true(queue.among_first(of(4), { { 3 }, { 5 } }, 2))
        assert.is_false(queue.among_first(of(9), { { 3, more = true } }, 100))
    end)

    it("agrees with a sort, whoever has which ticket", function()
        math.randomseed(99)
        for _ = 1, 300 do
            local queues, lists = { queue.new(), queue.new(), queue.new() }, {}
            local free, n = math.random(0, 12), math.random(0, 20)
            local wanted, got = {}, {}
            for number = 1, n do
                queue.add(queues[math.random(3)], waiter(number))
                wanted[#wanted + 1] = number <= free and number or nil
            end
            for i = 1, 3 do
                local text = queue.heads(queues[i], 32)
                lists[i] = text and queue.parse(text) or {}
            end
            for i = 1, 3 do
                local others = { lists[i % 3 + 1], lists[(i + 1) % 3 + 1] }
                for _, number in ipairs(turns(queues[i], others, free)) do
                    got[#got + 1] = number
                end
            end
            table.sort(got)
            assert.same(wanted, got)
        end
    end)
end)
