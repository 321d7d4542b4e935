-- The rooms of this worker's waiting requests, one per service, in order with those of the other
-- workers. Each waiter has a ticket of a counter that all workers share, and its own semaphore.
-- What is free goes to the lowest tickets of all: each worker shows its first ones and wakes those
-- of its own that are among the first of all. So only those are woken that may go on. A grant
-- reserves nothing: a woken waiter tries to be admitted itself, so one whose client vanished leaks
-- nothing; and a wake-up that gets lost costs a tick.
--
-- Per worker: the rooms and the waiters by ticket. Shared (through the store): the next ticket,
-- and what each worker shows of each room, which lapses when the worker no longer renews it; so
-- one that died or hangs blocks nobody for long. A waiter's ticket stands in an nginx variable: it
-- survives named locations, so a request that is tried again has kept its turn; and after a
-- client's abort only the log phase runs.

local semaphore = require "ngx.semaphore"

local activity = require "gate.activity"
local balancer = require "gate.balancer"
local clock = require "gate.clock"
local queue = require "gate.queue"
local registry = require "gate.registry"
local store = require "gate.store"

local format = string.format
local next = next
local pairs = pairs
local tonumber = tonumber

local UNKNOWN = "\1"       -- room of requests that came before any snapshot; no name has this
local SHOWN = 32           -- tickets of a room that other workers see
local SHOWN_FOR_S = 0.5    -- without being renewed: that long a dead worker may block the others
local SHOW_AGAIN_S = 0.05

local rooms = {}   -- service name → queue, with what it shows and what was read of others
local waiters = {} -- ticket → waiter

local _M = { UNKNOWN = UNKNOWN }

-- What the workers show each other -----------------------------------------------------------

local function show(room, now)
    local text, last = queue.heads(room, SHOWN)
    room.shown, room.shown_last, room.shown_at = text, last, now
    store.show_queue(room.name, text, SHOWN_FOR_S)
end

-- Only a change among the first ones is news.
local function show_change(room, number)
    local last = room.shown_last
    if not last or number <= last or room.size <= SHOWN + 1 then
        show(room, clock.now())
    end
end

-- What the other workers show of their rooms for the same service
local function others(room, tags)
    local own, lists, n = store.tag(), {}, 0
    for i = 1, #tags do
        local tag = tags[i]
        local text = tag ~= own and store.shown_queue(tag, room.name)
        if text then
            local seen = room.seen[tag]
            if not seen or seen.text ~= text then
                seen = { text = text, list = queue.parse(text) }
                room.seen[tag] = seen
            end
            n = n + 1
            lists[n] = seen.list
        end
    end
    return lists
end

-- Coming and going ---------------------------------------------------------------------------

local function enter(waiter, name)
    local room = rooms[name]
    if not room then
        room = queue.new()
        room.name, room.seen = name, {}
        rooms[name] = room
    end
    waiter.name = name
    queue.add(room, waiter)
    show_change(room, waiter.number)
end

local function go(waiter)
    local room = rooms[waiter.name]
    queue.remove(room, waiter)
    show_change(room, waiter.number)
    if room.size == 0 then
        rooms[waiter.name] = nil
        if #others(room, store.workers()) == 0 then
            store.nobody_waits(waiter.name)
        end
    end
end

--- Give a request its ticket if it has none, and with it the place it will have. Returns it.
function _M.draw(var)
    local ticket = var.sg_ticket
    if ticket == "" then
        ticket = format("%d", store.ticket())
        var.sg_ticket = ticket
    end
    return ticket
end

--- Give a request its place, by the ticket it has or a new one. `since` is when this wait began.
function _M.join(var, name, since)
    local ticket = _M.draw(var)
    local waiter = {
        ticket = ticket, number = tonumber(ticket), semaphore = semaphore.new(0), granted = false,
        since = since,
    }
    waiters[ticket] = waiter
    enter(waiter, name)
    return waiter
end

--- A waiter goes on to another room: it is known now which service it waits for.
function _M.move(waiter, name)
    go(waiter)
    -- What it was woken for was the news, not a turn in the room it comes to.
    waiter.granted = false
    enter(waiter, name)
end

--- A request leaves its place to another, which comes with the same ticket; it counts as waiting
--- until that one does.
function _M.hand_over(waiter)
    go(waiter)
    waiters[waiter.ticket] = nil
end

--- A request waits no longer.
function _M.leave(var, waiter)
    _M.hand_over(waiter)
    activity.end_waiting(var)
end

--- Take a request out of its room, wherever it ended; the log phase.
function _M.forget(var)
    local waiter = next(waiters) and waiters[var.sg_ticket]
    if waiter then
        _M.leave(var, waiter)
    end
end

-- Turns --------------------------------------------------------------------------------------

local function grant(waiter)
    if not waiter.granted then
        waiter.granted = true
        waiter.semaphore:post(1)
    end
end

local function everyone_leaves(name)
    if name == UNKNOWN then
        return registry.version() ~= nil
    end
    local service = registry.find(name)
    return not service or (#service.routable == 0 and service.refusal ~= nil)
end

local function advance(room)
    local name = room.name
    if everyone_leaves(name) then
        queue.turns(room, {}, math.huge, grant)
        return false
    end
    local service = registry.find(name)
    if not service or #service.routable == 0 then
        return false
    end
    local tags = store.workers()
    -- Read before what is free is counted: whoever leaves a room has been counted before, so
    -- nobody takes the room's new first for the one whose turn it was.
    local lists = others(room, tags)
    local free = balancer.capacity(service)
    if free > 0 then
        queue.turns(room, lists, free, grant)
        return false
    end
    local slots = #service.routable * service.max_in_flight
    return #tags > 1 and balancer.full(service) and queue.among_first(room, lists, slots + 1)
end

--- Wake the first waiters of a service, as many as may go on now.
function _M.advance(name)
    local room = rooms[name]
    if room then
        advance(room)
    end
end

--- The same for all services; the tick, and whoever stored a new snapshot. Returns whether one of
--- the slots that get free next is for a waiter of this worker: another worker may free it, and
--- cannot tell.
function _M.advance_all()
    local eager = false
    local now = clock.now()
    for _, room in pairs(rooms) do
        if now - room.shown_at > SHOW_AGAIN_S then
            show(room, now)
        end
        eager = advance(room) or eager
    end
    return eager
end

--- Whether this worker has waiters for a service.
function _M.has(name)
    return rooms[name] ~= nil
end

--- Whether anyone waits for a service, in any worker: then newcomers queue.
function _M.busy(service)
    return rooms[service.name] ~= nil or store.somebody_waits(service.busy_key)
end

--- Whether anyone waits at all in this worker.
function _M.any()
    return next(rooms) ~= nil
end

return _M
