-- Match a request to a service or to one of the gate's own pages. Pure: loads without nginx, has no
-- state. Works on the path exactly as the client sent it, never on a decoded or tidied one, so that
-- what is checked here is what the service sees.

local find = string.find
local format = string.format
local sub = string.sub
local byte = string.byte
local tonumber = tonumber

local SLASH = byte("/")

-- What the gate answers itself; routes cannot have these names. Whole paths, and first segments
-- with whatever follows.
local OWN_PATHS = {
    ["/"] = "page",
    ["/info"] = "page",
    ["/metrics"] = "metrics",
    ["/healthz"] = "healthz",
    ["/readyz"] = "readyz",
    ["/v1/models"] = "models",
    ["/v1/models/"] = "models",
    ["/enable_service_management"] = "admin",
    ["/disable_service_management"] = "admin",
    ["/kill_disable_service_management"] = "admin",
}
local OWN_SEGMENTS = { v1 = "api", admin = "admin" }
-- The same with the name of a route or service behind: a name is never empty.
local OWN_NAMED = {
    { pattern = "^/check_[^/]+$", kind = "page" },
    { pattern = "^/demand_[^/]+$", kind = "admin" },
    { pattern = "^/info/.", kind = "page" },
}
local MODEL_NAMED = "^/v1/models/."

local _M = {}

local function bad_escape(path)
    local at = find(path, "%", 1, true)
    while at do
        local code = tonumber(sub(path, at + 1, at + 2), 16)
        -- %2f and %5c would be slashes to the service, %00-%1f and %7f cut or corrupt its logs.
        if not code or code < 32 or code == 47 or code == 92 or code == 127 then
            return true
        end
        at = find(path, "%", at + 1, true)
    end
    return false
end

-- Some services leave out what stands behind a semicolon: "..;x" is ".." to them.
local function has_dot_segment(path)
    local plain = path:gsub("%%2[eE]", "."):gsub("%%3[bB]", ";")
    return find(plain .. "/", "/%.%.?[;/]") ~= nil
end

--- Whether a raw path (without query) may be passed on.
function _M.safe(path)
    if byte(path) ~= SLASH or find(path, "[%c\\#]") then
        return false
    end
    local escaped = find(path, "%", 1, true)
    if escaped and bad_escape(path) then
        return false
    end
    return not ((escaped or find(path, "/.", 1, true)) and has_dot_segment(path))
end

--- Prepare a list of path prefixes for `under`.
function _M.prefixes(list)
    local prepared = {}
    for i, prefix in ipairs(list) do
        local last = #prefix
        while last > 0 and byte(prefix, last) == SLASH do
            last = last - 1
        end
        prepared[i] = sub(prefix, 1, last)
    end
    return prepared
end

--- Whether a path lies under one of the prepared prefixes, at a segment boundary.
function _M.under(prefixes, path)
    for i = 1, #prefixes do
        local prefix = prefixes[i]
        local n = #prefix
        if n == 0 or sub(path, 1, n) == prefix and (#path == n or byte(path, n + 1) == SLASH) then
            return true
        end
    end
    return false
end

local function own_page(path, segment)
    local kind = OWN_PATHS[path]
    if kind then
        return kind
    end
    for _, own in ipairs(OWN_NAMED) do
        if find(path, own.pattern) then
            return own.kind
        end
    end
    return OWN_SEGMENTS[segment]
end

--- A path with everything but printable ASCII percent-encoded; nil if it needs no change.
function _M.printable(path)
    if not find(path, "[^!-~]") then
        return nil
    end
    return (path:gsub("[^!-~]", function(char)
        return format("%%%02X", byte(char))
    end))
end

--- What a raw path of a service is to the gate: a table with `kind` ("service", or the code of a
--- problem), `service`, `path` (what the service is asked), `passive` (asking it wakes nobody).
function _M.target(service, path)
    if not _M.under(service.api_prefixes, path) then
        return { kind = "path-not-allowed", service = service }
    end
    local passive = _M.under(service.no_wake, path)
    return { kind = "service", service = service, path = path, passive = passive }
end

--- Match a raw path (without query) against `routes`: route name → service, whose `api_prefixes`
--- and `no_wake` are prepared. Returns what `target` says, or a table with an own page's kind or
--- the code of a problem as `kind`; with kind "api" the `path`, for which a body names the service.
function _M.match(routes, path)
    if find(path, MODEL_NAMED) then
        -- A name may have slashes, and clients encode them.
        return { kind = "models" }
    elseif not _M.safe(path) then
        return { kind = "bad-path" }
    end
    local slash = find(path, "/", 2, true)
    local segment = sub(path, 2, slash and slash - 1 or -1)
    local service = routes[segment]
    if not service then
        return { kind = own_page(path, segment) or "no-such-route", path = path }
    end
    return _M.target(service, slash and sub(path, slash) or "/")
end

return _M
