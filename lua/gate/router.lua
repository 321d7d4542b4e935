-- Match a request to a service or to one of the gate's own pages. Pure: loads without nginx, has no
-- state. Works on the path exactly as the client sent it, never on a decoded or tidied one, so that
-- what is checked here is what the service sees.

local find = string.find
local sub = string.sub
local byte = string.byte
local tonumber = tonumber

local SLASH = byte("/")

-- First segments the gate answers itself. Routes cannot have these names.
local OWN = {
    [""] = "page",
    info = "page",
    metrics = "metrics",
    healthz = "healthz",
    readyz = "readyz",
    v1 = "openai",
    admin = "admin",
    enable_service_management = "admin",
    disable_service_management = "admin",
    kill_disable_service_management = "admin",
}

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

local function has_dot_segment(path)
    local plain = path:gsub("%%2[eE]", ".")
    return find(plain .. "/", "/%.%.?/") ~= nil
end

--- Whether a raw path (without query) may be passed on.
function _M.safe(path)
    if byte(path) ~= SLASH or find(path, "[%c\\]") then
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

local function own_page(segment)
    local kind = OWN[segment]
    if kind then
        return kind
    elseif sub(segment, 1, 6) == "check_" then
        return "page"
    elseif sub(segment, 1, 7) == "demand_" then
        return "admin"
    end
    return nil
end

--- Match a raw request URI against `routes` (route name → service, whose `api_prefixes` are prepared).
--- Returns kind, service, what the service is asked (path and query), the path to it, the raw path.
--- Kind is "service", an own page's kind, or the code of a problem.
function _M.match(routes, uri)
    local mark = find(uri, "?", 1, true)
    local path = mark and sub(uri, 1, mark - 1) or uri
    if not _M.safe(path) then
        return "bad-path", nil, nil, nil, path
    end
    local slash = find(path, "/", 2, true)
    local segment = sub(path, 2, slash and slash - 1 or -1)
    local service = routes[segment]
    if not service then
        return own_page(segment) or "no-such-route", nil, nil, nil, path
    end
    local rest = slash and sub(path, slash) or "/"
    if not _M.under(service.api_prefixes, rest) then
        return "path-not-allowed", service, nil, rest, path
    end
    return "service", service, mark and rest .. sub(uri, mark) or rest, rest, path
end

return _M
