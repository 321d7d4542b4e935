-- What a worker does beside requests: one tick for everything. While anyone waits, or the leader
-- has a starting replica to poll, it comes every 5 ms instead of every 20 ms. Per worker: whether a
-- tick runs, when the rarer duties are due, whether this worker leads.

local activity = require "gate.activity"
local clock = require "gate.clock"
local health = require "gate.health"
local hold = require "gate.hold"
local notifier = require "gate.notifier"
local registry = require "gate.registry"
local store = require "gate.store"

local exiting = ngx.worker.exiting
local sleep = ngx.sleep

local TICK_S = 0.02
local QUICK_S = 0.005
local QUICK_ROUNDS = 200      -- then a fresh timer goes on, so that no context lives for long
local LEASE_S = 1
local RENEW_S = 0.2
local LEADERLESS_S = 0.3      -- after that long an exiting worker leads: it may be the only one
local REAP_S = 0.5
local SWEEP_S = 5

local running = false
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
    registry.refresh()
    activity.flush()
    hold.advance_all()
    local waiting = hold.any()
    notifier.signal(now, waiting)
    lead(now)
    local starting = false
    if leading then
        if now >= reap_at then
            store.reap()
            reap_at = now + REAP_S
        end
        starting = health.tick(now)
        notifier.keep_pace(now)
    end
    if now >= sweep_at then
        activity.sweep()
        sweep_at = now + SWEEP_S
    end
    return waiting or starting
end

local function guarded()
    local ok, quick = pcall(duties)
    if not ok then
        ngx.log(ngx.ERR, "tick: ", quick)
        return false
    end
    return quick
end

-- In a worker that exits every timer fires once more and never again: its last tick stays until no
-- request is left, so that held requests are released and counts are told.
local function last_tick()
    repeat
        local quick = guarded()
        sleep(quick and QUICK_S or TICK_S)
    until activity.holding() == 0 and not notifier.hurries()
    guarded()
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
        if not guarded() or exiting() then
            break
        end
        sleep(QUICK_S)
    end
    running = false
end

--- Begin; once per worker, after it has joined.
function _M.start()
    notifier.start(hold.advance_all)
    local ok, err = ngx.timer.every(TICK_S, tick)
    if not ok then
        ngx.log(ngx.EMERG, "tick timer: ", err)
    end
end

return _M
