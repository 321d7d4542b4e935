-- An ordered queue of waiters, and its place among the queues of other workers. Pure: loads without
-- nginx, has no state of its own.
--
-- A waiter is a table with a `number` (its ticket), and is linked through its fields `before` and
-- `after`. A queue shows its first numbers to others as a text, "3 7 9", with a plus behind it when
-- more follow. What others show is a list of numbers with the field `more`.

local concat = table.concat
local tonumber = tonumber

local _M = {}

--- An empty queue.
function _M.new()
    return { size = 0 }
end

-- The waiter behind which a number belongs; nil at the very front. Most numbers are new and high;
-- one that comes back is old and low: the search begins at the nearer end.
local function place(queue, number)
    local first, last = queue.first, queue.last
    if not last or number < first.number then
        return nil
    elseif number - first.number > last.number - number then
        while last.number > number do
            last = last.before
        end
        return last
    end
    while first.after and first.after.number < number do
        first = first.after
    end
    return first
end

--- Put a waiter where its number belongs.
function _M.add(queue, waiter)
    local before = place(queue, waiter.number)
    local after = queue.first
    if before then
        after = before.after
        before.after = waiter
    else
        queue.first = waiter
    end
    if after then
        after.before = waiter
    else
        queue.last = waiter
    end
    waiter.before, waiter.after = before, after
    queue.size = queue.size + 1
end

--- Take a waiter out.
function _M.remove(queue, waiter)
    local before, after = waiter.before, waiter.after
    if before then
        before.after = after
    else
        queue.first = after
    end
    if after then
        after.before = before
    else
        queue.last = before
    end
    waiter.before, waiter.after = nil, nil
    queue.size = queue.size - 1
end

--- What the queue shows to others: its first `limit` numbers as a text, nil when it is empty; and
--- the last number shown.
function _M.heads(queue, limit)
    local waiter, n, shown, last = queue.first, 0, {}, nil
    while waiter and n < limit do
        n = n + 1
        shown[n] = waiter.ticket
        last = waiter.number
        waiter = waiter.after
    end
    if n == 0 then
        return nil
    end
    return concat(shown, " ") .. (waiter and "+" or ""), last
end

--- The list that a text of `heads` stands for.
function _M.parse(text)
    local list, n = { more = text:sub(-1) == "+" }, 0
    for number in text:gmatch("%d+") do
        n = n + 1
        list[n] = tonumber(number)
    end
    return list
end

-- Position of the first in a list that is not below a number, searched from a position on where all
-- before are; nil when the list does not reach so far but its queue may.
local function below(list, number, from)
    local n = #list
    while from <= n and list[from] < number do
        from = from + 1
    end
    if from > n and list.more then
        return nil
    end
    return from
end

--- Whether the first of the queue is among the first `n` of all, the other queues included.
function _M.among_first(queue, lists, n)
    local number, rank = queue.first.number, 1
    for i = 1, #lists do
        local from = below(lists[i], number, 1)
        if not from then
            return false
        end
        rank = rank + from - 1
    end
    return rank <= n
end

--- Call `visit` with those waiters of the queue, in order, that are among the `free` first of all
--- queues.
function _M.turns(queue, lists, free, visit)
    local waiter, own = queue.first, 0
    local at = {}
    while waiter do
        own = own + 1
        local rank = own
        for i = 1, #lists do
            local from = below(lists[i], waiter.number, at[i] or 1)
            if not from then
                return
            end
            at[i] = from
            rank = rank + from - 1
        end
        if rank > free then
            return
        end
        -- Whoever visits may take the waiter out.
        local after = waiter.after
        visit(waiter)
        waiter = after
    end
end

return _M
