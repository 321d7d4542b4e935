-- Which pages in browsers may read answers (CORS). The gate answers the question before a request
-- (preflight) itself: it wakes nothing and needs no key. Which origin an answer is open to stands
-- in $sg_origin, - for none; nginx writes the headers, because it sends answers of its own as well.
--
-- Per worker: the lists as sets, by the list; origins of all services, by the version they are of.

local registry = require "gate.registry"
local settings = require "gate.settings"

local find = string.find
local ipairs = ipairs
local next = next
local setmetatable = setmetatable

local METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
local REMEMBER_S = 600
local NO_CONTENT = 204
local ANY = "*"
-- A list of header names as a browser writes it
local NAMES = "^[%w!#$%%&'*+.^_`|~, -]*$"
local HEADERS_LIMIT = 1024

local sets = setmetatable({}, { __mode = "k" }) -- list → set of origins, false if empty
local of_all      -- list of the gate and all services
local of_version  -- of the snapshot it was made from

local _M = {}

local function append(all, list)
    for _, origin in ipairs(list or {}) do
        all[#all + 1] = origin
    end
end

local function collect()
    local all = {}
    append(all, settings.cors)
    for _, service in ipairs(registry.services()) do
        append(all, service.cors)
    end
    return all
end

-- Without a closure in it: each request by model asks, and leaving one's scope is not compiled.
local function origins_of_all()
    local version = registry.version()
    if not of_all or of_version ~= version then
        of_all, of_version = collect(), version
    end
    return of_all
end

-- The list for a service; for nil, while nobody knows the service, all that any may have.
local function list_for(service)
    return service and (service.cors or settings.cors) or not service and origins_of_all()
end

local function set_of(list)
    local set = sets[list]
    if set == nil then
        set = {}
        for _, origin in ipairs(list) do
            set[origin] = true
        end
        set = next(set) and set or false
        sets[list] = set
    end
    return set
end

local function allowed(set, origin)
    return set[ANY] and ANY or set[origin] and origin or nil
end

-- Which headers a page may send: those it asks for, if they are names at all.
local function wanted_headers(var)
    local names = var.http_access_control_request_headers
    if not names or #names > HEADERS_LIMIT or not find(names, NAMES) then
        return nil
    end
    return names
end

local function answer_preflight(var, open_to)
    local header = ngx.header
    if open_to then
        header["Access-Control-Allow-Methods"] = METHODS
        header["Access-Control-Allow-Headers"] = wanted_headers(var)
        header["Access-Control-Max-Age"] = REMEMBER_S
    end
    ngx.req.discard_body()
    ngx.status = NO_CONTENT
    ngx.send_headers()
    return ngx.exit(ngx.HTTP_OK)
end

--- Whether any origin may read answers of a service.
function _M.configured(service)
    return set_of(service.cors or settings.cors) ~= false
end

--- Note which origin may read the answer to a request. `service` is nil as long as nobody knows it.
--- Returns whether origins are the gate's business here, and the origin if it may.
function _M.note(var, service)
    local set = set_of(list_for(service))
    if not set then
        var.sg_origin = "" -- it was found open to others, while nobody knew the service
        return false
    end
    local origin = var.http_origin
    local open_to = origin and allowed(set, origin)
    var.sg_origin = open_to or "-"
    return true, open_to
end

--- The same; answers a preflight, and does not return then.
function _M.check(var, service)
    local ours, open_to = _M.note(var, service)
    if ours and var.request_method == "OPTIONS" and var.http_origin
        and var.http_access_control_request_method then
        return answer_preflight(var, open_to)
    end
end

return _M
