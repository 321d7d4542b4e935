-- One function per nginx phase, each a short list of calls in reading order. No state.

local activity = require "gate.activity"
local balancer = require "gate.balancer"
local cors = require "gate.cors"
local duties = require "gate.duties"
local flows = require "gate.flows"
local hold = require "gate.hold"
local hops = require "gate.hops"
local notifier = require "gate.notifier"
local pages = require "gate.pages"
local problem = require "gate.problem"
local registry = require "gate.registry"
local relay = require "gate.relay"
local rooms = require "gate.rooms"
local router = require "gate.router"
local routing = require "gate.routing"
local store = require "gate.store"

local CLIENT_GONE = 499
-- The same while its body was read: a service may say these too.
local OF_BODIES = { [400] = true, [408] = true }

local PAGES = {
    page = true, metrics = true, healthz = true, readyz = true, models = true, admin = true,
}

-- What a newer snapshot may answer otherwise
local OUTDATED = { ["no-such-route"] = true, ["path-not-allowed"] = true }

local _M = {}

--- A worker starts.
function _M.init_worker()
    math.randomseed(ngx.now() * 1000 + ngx.worker.pid())
    local ok, err = store.join()
    if not ok then
        ngx.log(ngx.EMERG, err)
        return
    end
    registry.refresh()
    duties.start()
end

-- Whether a body may still be on its way. nginx reads it before it connects, so a slot would be
-- taken by whoever sends slowly.
local function has_body(var)
    return var.http_content_length or var.http_transfer_encoding
        or (var.server_protocol == "HTTP/2.0" and var.request_method ~= "GET")
end

-- To a replica, or to the waiting room
local function pass(var, target, query)
    local service = target.service
    if service.prefix_affinity and #service.routable > 1 then
        routing.look_into(var)
    end
    activity.arrive(var, target, query)
    if service.max_in_flight > 0 and has_body(var) then
        if #service.routable == 0 or rooms.busy(service) or balancer.full(service) then
            return hold.enter(var, service) -- who has to wait, or is refused, need not send it yet
        end
        ngx.req.read_body()
        service = registry.find(service.name) -- there may be another snapshot since
        if not service then
            return problem.send("no-such-route", {})
        end
    end
    if not rooms.busy(service) and balancer.admit(var, service) then
        var.sg_tries = "1"
        var.sg_waited = "0.000"
        return
    end
    return hold.enter(var, service)
end

local function serve(var, target, query)
    local service = target.service
    if routing.guarded(service) then
        local ok, code, facts = routing.check(var, service)
        if not ok then
            return problem.send(code, facts or {})
        end
    end
    return pass(var, target, query)
end

-- The body says which service is meant.
local function serve_by_model(var)
    local target, query, facts = routing.find(var)
    if target then
        return pass(var, target, query)
    elseif query then
        return problem.send(query, facts or {})
    end
    return hold.enter(var, nil)
end

--- A request came.
function _M.access()
    local var = ngx.var
    local detail = hops.examine(var)
    if detail then
        var.sg_detail = detail
        -- nginx ends the connection then: where the next request begins is as doubtful.
        return ngx.exit(ngx.HTTP_BAD_REQUEST)
    end
    local uri = var.request_uri
    local target, query = registry.match(uri)
    if OUTDATED[target.kind] and notifier.confirm() then
        target, query = registry.match(uri)
    end
    local kind = target.kind
    if target.printable then
        var.sg_path = target.printable
    end
    if kind == "service" then
        return serve(var, target, query)
    elseif kind == "api" then
        return serve_by_model(var)
    elseif kind == "models" then
        cors.check(var, nil)
    end
    if PAGES[kind] then
        return pages.answer(var, kind)
    elseif kind == "no-such-route" and not registry.complete() then
        return hold.enter(var, nil)
    end
    cors.note(var, target.service)
    return problem.send(kind, { service = target.service and target.service.name })
end

--- A held request begins to wait, its body read.
function _M.hold()
    return hold.wait(ngx.var)
end

--- A try failed before the service's answer began.
function _M.again()
    return hold.again(ngx.var)
end

--- A held stream begins to send comment lines.
function _M.relay()
    return relay.answer(ngx.var)
end

--- What such a stream asks of the gate again came in by the inner listener.
function _M.inner()
    return hold.resume(ngx.var)
end

--- nginx asks where to connect to.
function _M.balancer()
    return balancer.set_peer()
end

--- nginx refused a request by itself.
function _M.error()
    local var = ngx.var
    -- A request line that could not be parsed is known only as a whole.
    local path = (var.request or ""):match("^[!-~]+ ([^? ]*)") or ""
    local code, detail = problem.code_of(ngx.status)
    if var.sg_detail ~= "" then
        detail = var.sg_detail
        code = detail == hops.TOO_MANY and "headers-too-large" or code
    elseif code == "bad-request" and path ~= "" and not router.safe(path) then
        code = "bad-path"
    end
    var.sg_path = router.printable(path) or path
    rooms.forget(var)
    activity.abandon(var)
    cors.note(var, nil)
    return problem.send(code, { detail = detail })
end

--- The header of the backend's answer to an admin call is about to be sent.
function _M.admin_answered()
    return pages.changed()
end

--- The backend did not take an admin call.
function _M.backend_away()
    return problem.send("backend-away", {})
end

-- Whether a request that has ended was answered by the replica it is on.
local function answered(var)
    local status = ngx.status
    return status ~= CLIENT_GONE and (not OF_BODIES[status] or var.upstream_status ~= nil)
end

--- A request has ended, however it did.
function _M.log()
    flows.finish()
    local var = ngx.var
    rooms.forget(var)
    pages.forget(var)
    rooms.advance(activity.release(var, answered(var)))
end

return _M
