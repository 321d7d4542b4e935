-- The bodies of errors in the shapes clients know: RFC 9457, OpenAI's, Anthropic's. Pure: loads
-- without nginx, has no state.

local cjson = require "cjson.safe"

local json = require "gate.json"

local find = string.find
local format = string.format

local TYPE_PREFIX = "https://slurmgate.dev/problems/"

local OPENAI_TYPES = {
    [401] = "authentication_error", [403] = "permission_error", [429] = "rate_limit_error",
}
local ANTHROPIC_TYPES = {
    [401] = "authentication_error", [403] = "permission_error", [404] = "not_found_error",
    [413] = "request_too_large", [429] = "rate_limit_error", [503] = "overloaded_error",
    [504] = "timeout_error",
}

local _M = {}

--- The shape that clients of a raw path (without query) expect: "openai", "anthropic", or "".
function _M.of(path)
    if find(path .. "/", "^/v1/messages/") then
        return "anthropic"
    end
    return find(path .. "/", "^/v1/") and "openai" or ""
end

--- What an error of this status is called in a shape; OpenAI's unless it is "anthropic".
function _M.kind(shape, status)
    local anthropic = shape == "anthropic"
    local types = anthropic and ANTHROPIC_TYPES or OPENAI_TYPES
    local clients = status >= 400 and status < 500
    return types[status] or (clients and "invalid_request_error")
        or (anthropic and "api_error" or "server_error")
end

-- What a person reads: some clients show nothing else.
local function message(problem)
    if problem.reason and problem.reason ~= problem.code then
        return format("%s (%s)", problem.detail, problem.reason)
    end
    return problem.detail
end

-- Beside the error, not in it: libraries know what fields an error has.
local function openai(problem)
    return {
        error = {
            message = message(problem), code = problem.code, param = problem.param or cjson.null,
            type = _M.kind("openai", problem.status),
        },
        service = problem.service, state = problem.state, reason = problem.reason,
        retry_after_s = problem.retry_after_s,
    }
end

local function anthropic(problem)
    return {
        type = "error",
        error = {
            type = _M.kind("anthropic", problem.status), message = message(problem),
        },
        code = problem.code, service = problem.service, state = problem.state,
        reason = problem.reason, retry_after_s = problem.retry_after_s,
    }
end

local function plain(problem)
    return {
        type = TYPE_PREFIX .. problem.code, title = problem.title, status = problem.status,
        detail = problem.detail, service = problem.service, state = problem.state,
        reason = problem.reason, log = problem.log, retry_after_s = problem.retry_after_s,
    }
end

local SHAPES = { openai = openai, anthropic = anthropic }

--- The JSON text of an error, and its content type. `problem`: code, status, title, detail, and
--- where there is one param, service, state, reason, log, retry_after_s.
function _M.render(shape, problem)
    local make = SHAPES[shape]
    local text = json.encode((make or plain)(problem)) .. "\n"
    return text, make and "application/json" or "application/problem+json"
end

return _M
