-- When a request that a replica broke off with may be sent again. What ends one replica often ends
-- several: a login host that restarts cuts all tunnels through it, one a moment after the other,
-- and each still takes connections until then. Sent again at once, a request may meet that end
-- twice. So it waits, outside the room, until every replica it may go to has shown some time after
-- the break that it lives: by an answer, or by a poll, which the leading worker makes because of
-- it. One whose poll breaks off too is suspected, and out of the choice.
--
-- No state of its own. Shared (through the store): when a replica of a service last broke off with
-- a request that is sent again, and when the last poll began that a replica in doubt answered.

local clock = require "gate.clock"
local registry = require "gate.registry"
local store = require "gate.store"

local max = math.max
local min = math.min
local sleep = ngx.sleep

local MOMENT_S = 0.1      -- between the ends of replicas that end together
-- Noted as an answer is what came in the fifth of a second before, too.
local ANSWER_MOMENT_S = MOMENT_S + 0.2
local PATIENCE_S = 1      -- with one that shows nothing, while another has
local LOOK_EVERY_S = 0.02
local LEAST_WAIT_S = 0.001
local KEPT_S = 60

local _M = {}

local function lives_key(replica)
    return "lives:" .. replica.id .. ":" .. replica.gen
end

-- Of one that starts the polls are many anyway.
local function last_break(replica)
    return replica.phase == "ready" and store.time(replica.service.broke_key) or nil
end

--- Note that a replica of a service broke off with a request that is sent again: those beside it
--- are in doubt now.
function _M.note_break(service, now)
    store.advance_time(service.broke_key, now, KEPT_S)
end

--- Whether a replica is in doubt because of such a break.
function _M.doubted(replica)
    return last_break(replica) ~= nil
end

--- Whether a replica must be polled because of a break; `began` is when its last poll did. At once,
--- and again when the moment is over in which others may have ended. Breaks without an end do not
--- put that off, nor make more polls than one in a moment.
function _M.poll_due(replica, began, now)
    local broke = last_break(replica)
    return broke ~= nil and began < broke + MOMENT_S and now - began >= MOMENT_S
end

--- Note that a replica in doubt answered a poll, which began then.
function _M.answered_poll(replica, began)
    store.advance_time(lives_key(replica), began, KEPT_S)
end

local function lives(replica, broke)
    local polled = store.time(lives_key(replica)) or 0
    local answered = max(replica.answered, store.time("answered:" .. replica.id) or 0)
    return polled >= broke + MOMENT_S or answered >= broke + ANSWER_MOMENT_S
end

local function may_go(service, broke, now)
    local routable, living = service.routable, 0
    for i = 1, #routable do
        if lives(routable[i], broke) then
            living = living + 1
        end
    end
    -- Without a routable one the waiting room is the place to wait. With none that shows anything
    -- there is nothing better to try than them, once a poll has had its time.
    local waited = now - broke
    return living == #routable or (living > 0 and waited >= PATIENCE_S)
        or waited >= MOMENT_S + service.health.timeout
end

--- Wait until a request may be sent again whose try broke off at a point in time, at the longest
--- until `last`.
function _M.wait(name, broke, last)
    local pause = MOMENT_S -- nothing can show before
    while true do
        registry.refresh()
        local service, now = registry.find(name), clock.now()
        if not service or now >= last or may_go(service, broke, now) then
            return
        end
        sleep(max(LEAST_WAIT_S, min(pause, last - now)))
        pause = LOOK_EVERY_S
    end
end

return _M
