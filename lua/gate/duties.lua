-- What a worker does beside requests: one tick for everything. While anyone waits, or the leader
-- has a starting replica to poll, it comes every 5 ms instead of every 20 ms; and every millisecond
-- this worker looks whether another has freed the slot that one of its waiters is next for.
-- Per worker: whether a tick runs, when the rarer duties are due, whether this worker leads,
-- whether it looks for a slot.

local activity = require "gate.activity"
local clock = require "gate.clock"
local health = require "gate.health"
local idlers = require "gate.idlers"
local keys = require "gate.keys"
local notifier = require "gate.notifier"
local registry = require "gate.registry"
local rooms = require "gate.rooms"
local store = require "gate.store"

local exiting = ngx.worker.exiting
local sleep = ngx.sleep
local timer_at = ngx.timer.at

local TICK_S = 0.02
local QUICK_S = 0.005
local EAGER_S = 0.001
local QUICK_ROUNDS = 200      -- then a fresh timer goes on, so that no context lives for long
local LEASE_S = 1
local RENEW_S = 0.2
local LEADERLESS_S = 0.3      -- after that long an exiting worker leads: it may be the only one
local REAP_S = 0.5
local SWEEP_S = 5

local running = false
local ending = false
local eager = false
local leading = false
local renew_at, reap_at, sweep_at = 0, 0, 0
local led_at -- when an exiting worker last saw a leader

local _M = {}

local function lead(now)
    if leading and now < renew_at then
        return
    end
    local may_take = true
    if exiting() then
        if not led_at then
            store.abdicate()
            led_at = now
        elseif not store.leaderless() then
            led_at = now
        end
        may_take = now - led_at > LEADERLESS_S
        leading = false
        if not may_take then
            return
        end
    end
    leading = store.lead(LEASE_S, may_take)
    renew_at = now + RENEW_S
end

local function duties()
    local now = clock.now()
    keys.refresh()
    registry.refresh()
    idlers.look(now)
    activity.flush()
    eager = rooms.advance_all()
    local waiting = rooms.any()
    notifier.signal(now, waiting)
    lead(now)
    -- A dead leader does not reap, and those who wait may wait for the slots of the dead.
    if (leading or waiting) and now >= reap_at then
        store.reap()
        reap_at = now + REAP_S
    end
    local starting = false
    if leading then
        starting = health.tick(now)
        notifier.keep_pace(now)
    end
    if now >= sweep_at then
        activity.sweep()
        sweep_at = now + SWEEP_S
    end
    return waiting or starting
end

local function look_for_slot()
    eager = rooms.advance_all()
end

local function guarded(duty)
    local ok, result = pcall(duty)
    if not ok then
        ngx.log(ngx.ERR, "tick: ", result)
        eager = false
        return false
    end
    return result
end

-- Until the next tick of a busy time
local function pause()
    local left = QUICK_S
    while eager and left > EAGER_S do
        sleep(EAGER_S)
        left = left - EAGER_S
        guarded(look_for_slot)
    end
    sleep(left)
end

-- In a worker that exits every timer fires once more and never again: its last tick stays until no
-- request is left, so that held requests are released and counts are told.
local function last_tick()
    if ending then
        return
    end
    ending = true
    repeat
        if guarded(duties) then
            pause()
        else
            sleep(TICK_S)
        end
    until activity.holding() == 0 and not idlers.any() and not notifier.hurries()
    guarded(duties)
    store.abdicate()
end

local function tick(premature)
    if premature then
        return last_tick()
    end
    if running then
        return
    end
    running = true
    for _ = 1, QUICK_ROUNDS do
        if not guarded(duties) or exiting() then
            running = false
            return
        end
        pause()
    end
    running = false
    -- If it cannot be had, the next one comes by itself.
    timer_at(0, tick)
end

--- Begin; once per worker, after it has joined.
function _M.start()
    notifier.start(rooms.advance_all)
    local ok, err = ngx.timer.every(TICK_S, tick)
    if not ok then
        ngx.log(ngx.EMERG, "tick timer: ", err)
    end
end

return _M
