-- Which service a request is for, and whether whoever sent it may use it. No state: what was found
-- out about a body stands in nginx variables, because a request may be held before it is routed.

local cors = require "gate.cors"
local keys = require "gate.keys"
local notifier = require "gate.notifier"
local payload = require "gate.payload"
local registry = require "gate.registry"
local shapes = require "gate.shapes"

local concat = table.concat
local format = string.format

local NAMES_SHOWN = 50   -- of known models, in a refusal
local SHOWN_OF_NAME = 200

local _M = {}

-- Keys and origins ----------------------------------------------------------------------------

--- Whether `check` has anything to check.
function _M.guarded(service)
    return keys.required() or cors.configured(service)
end

--- Whether the sender may use a service: true, or nil with a code and facts. `key` is the sender's
--- if that was found before. Answers preflights itself, and does not return then.
function _M.check(var, service, key)
    cors.check(var, service)
    if keys.required() then
        return keys.authorise(var, service, key)
    end
    return true
end

-- Models --------------------------------------------------------------------------------------

--- Whether the owner of a key, nil for nobody, may use a service.
function _M.open_to(key, service)
    return not keys.required() or service.public or (key and keys.may(key, service)) or false
end

--- Names of the models that the owner of a key may use; nil for nobody.
function _M.models_for(key)
    local names = {}
    for _, name in ipairs(registry.models()) do
        if _M.open_to(key, registry.by_model(name)) then
            names[#names + 1] = name
        end
    end
    return names
end

--- The caller's key: nil without one, false if it is wrong; and a code when nothing is open to the
--- caller.
function _M.caller(var)
    if not keys.required() then
        return nil
    end
    local key = keys.identify(var)
    return key, not key and #_M.models_for(nil) == 0 and "unauthorized" or nil
end

--- The 404 for a model that nobody offers: code and facts, with the names known to the caller.
function _M.no_such_model(name, key)
    local known = _M.models_for(key)
    local more = #known > NAMES_SHOWN and ", …" or ""
    local shown = name:sub(1, SHOWN_OF_NAME):gsub("[^ -~]", "?")
    return "no-such-model", {
        param = "model",
        detail = format("The model '%s' does not exist. Known models: %s%s.", shown,
            #known > 0 and concat(known, ", ", 1, math.min(#known, NAMES_SHOWN)) or "none", more),
    }
end

-- What was found in a body, for those who come later.
local function note(var, found)
    var.sg_stream = found.stream and "1" or "0"
    var.sg_place = found.place or ""
    var.sg_model = found.model or ""
end

--- Find out from the body of a request what there is to know, once.
function _M.look_into(var)
    if var.sg_stream ~= "" then
        return
    end
    ngx.req.read_body()
    local found = payload.inspect(var)
    if found then
        note(var, found)
    else
        var.sg_stream = "0"
    end
end

local function model_of(var)
    if var.sg_model ~= "" then
        return var.sg_model
    end
    ngx.req.read_body()
    local found, code, detail = payload.inspect(var)
    if not found then
        return nil, code, { detail = detail }
    elseif not found.model then
        return nil, "bad-body", { detail = found.model_problem, param = "model" }
    end
    note(var, found)
    return found.model, found
end

local function rename(var, name, found)
    local code, detail
    if not found then
        found, code, detail = payload.inspect(var)
        if not found then
            return nil, code, { detail = detail }
        end
    end
    local ok, failed, why = payload.rename(found, name)
    return ok, failed, { detail = why }
end

-- The target of a request whose service is known by its model, if it may go there.
local function to_service(var, service, path, found, key)
    local ok, code, facts = _M.check(var, service, key)
    if not ok then
        if code == "unauthorized" then
            facts.service = nil -- guessing names shall not pay
        end
        return nil, code, facts
    end
    local target = registry.target(service, path)
    if target.kind ~= "service" then
        return nil, target.kind, { service = service.name }
    end
    local own = service.upstream_model
    if own and own ~= var.sg_model then
        ok, code, facts = rename(var, own, found)
        if not ok then
            return nil, code, facts
        end
    end
    return target
end

local function by_model(var, path)
    var.sg_api = shapes.of(path)
    cors.check(var, nil)
    if var.request_method ~= "POST" then
        return nil, "method-not-allowed", { allow = "POST" }
    end
    local key, refused = _M.caller(var)
    if refused then
        return nil, refused
    elseif not registry.version() then
        return nil
    end
    local name, found, facts = model_of(var)
    if not name then
        return nil, found, facts
    end
    local service = registry.by_model(name)
    if not service and notifier.confirm() then
        service = registry.by_model(name)
    end
    if service then
        return to_service(var, service, path, found, key)
    elseif not registry.complete() then
        return nil
    elseif keys.required() and not key then
        -- As for a model there is: whoever has no key shall not find out by guessing.
        return nil, "unauthorized"
    end
    return nil, _M.no_such_model(name, key)
end

-- Everything ----------------------------------------------------------------------------------

--- What a request is for: its target, as router.match gives it, and its query. nil, a code and
--- facts: it is refused. nil alone: nobody can tell yet.
function _M.find(var)
    local target, query = registry.match(var.request_uri)
    local kind = target.kind
    if kind == "api" then
        local found, code, facts = by_model(var, target.path)
        return found, found and query or code, facts
    elseif kind == "no-such-route" and not registry.complete() then
        return nil
    elseif kind ~= "service" then
        return nil, kind, { service = target.service and target.service.name }
    end
    local service = target.service
    if _M.guarded(service) then
        local ok, code, facts = _M.check(var, service)
        if not ok then
            return nil, code, facts
        end
    end
    return target, query
end

return _M
