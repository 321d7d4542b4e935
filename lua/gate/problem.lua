-- The one table of everything the gate can refuse, and how it is said: code → status, body,
-- Retry-After. `render` is pure and loads without nginx; `send` writes the answer. No state.

local shapes = require "gate.shapes"

local ceil = math.ceil
local floor = math.floor
local max = math.max
local min = math.min
local pairs = pairs

local RETRY_LIMIT = 60 -- client libraries give up on longer ones

-- retry: seconds, or "estimate": the service's own estimate, with `default` where there is none
local CODES = {
    ["bad-path"] = { status = 400, title = "Path not acceptable",
        detail = "The path has dot segments, an encoded slash, or a control character." },
    ["bad-request"] = { status = 400, title = "Bad request",
        detail = "The request is not valid HTTP." },
    ["unauthorized"] = { status = 401, title = "Unauthorized",
        detail = "This needs a valid key.", challenge = "Bearer" },
    ["forbidden"] = { status = 403, title = "Forbidden",
        detail = "This is answered to private networks only." },
    ["no-such-route"] = { status = 404, title = "No such route",
        detail = "No service has this route." },
    ["path-not-allowed"] = { status = 404, title = "Path not allowed",
        detail = "The service exists, but this path of it is not open." },
    ["bad-body"] = { status = 400, title = "Body not acceptable",
        detail = "The body does not say which model is meant." },
    ["no-such-model"] = { status = 404, title = "No such model",
        detail = "No service offers this model." },
    ["method-not-allowed"] = { status = 405, title = "Method not allowed",
        detail = "This page does not take this method." },
    ["request-timeout"] = { status = 408, title = "Request timeout",
        detail = "The request did not arrive in time." },
    ["body-too-large"] = { status = 413, title = "Body too large",
        detail = "The request body is larger than this gate takes." },
    ["uri-too-long"] = { status = 414, title = "URI too long",
        detail = "The request line is longer than this gate takes." },
    ["headers-too-large"] = { status = 431, title = "Headers too large",
        detail = "The request headers are larger than this gate takes." },
    ["too-many-waiting"] = { status = 429, title = "Too many waiting", retry = "estimate",
        default = 5, detail = "The waiting room of this service is full." },
    ["too-many-requests"] = { status = 429, title = "Too many requests", retry = "estimate",
        default = 60, detail = "This key may not be used more often within a minute." },
    ["too-many-in-flight"] = { status = 429, title = "Too many at once", retry = "estimate",
        default = 1, detail = "This key may not be used for more requests at once." },
    ["internal"] = { status = 500, title = "Internal error",
        detail = "The gate failed; its error log says why." },
    ["upstream-failed"] = { status = 502, title = "Service failed",
        detail = "The service broke off while it had this request." },
    ["hold-timeout"] = { status = 503, title = "Service not ready yet", retry = "estimate",
        default = 10,
        detail = "The service is not up yet; the request was held as long as it may be." },
    ["start-failed"] = { status = 503, title = "Service failed to start", retry = "estimate",
        default = 5, detail = "The service ended before it was ready." },
    ["cannot-start"] = { status = 503, title = "Service cannot be started", retry = "estimate",
        default = 60, detail = "The service cannot be started." },
    ["disabled"] = { status = 503, title = "Service management is off", retry = "estimate",
        default = 60, detail = "Service management is off: nothing is started." },
    ["not-running"] = { status = 503, title = "Service is not running", retry = "estimate",
        default = 10, detail = "The service is not running, and this request does not start it." },
    ["not-ready"] = { status = 503, title = "Gate not ready", retry = 1,
        detail = "The gate has no routing table from the backend yet." },
    ["backend-away"] = { status = 503, title = "Backend away", retry = 1,
        detail = "The backend does not answer at the moment. Services go on." },
    ["upstream-timeout"] = { status = 504, title = "Service went silent",
        detail = "The service did not go on within its read timeout." },
}

-- What nginx refuses by itself, before any Lua runs
local BY_STATUS = {
    [400] = "bad-request", [403] = "forbidden", [404] = "no-such-route",
    [405] = "method-not-allowed", [408] = "request-timeout", [413] = "body-too-large",
    [414] = "uri-too-long", [431] = "headers-too-large", [494] = "headers-too-large",
    [501] = "bad-request", [505] = "bad-request", -- a transfer encoding or version it does not know
    [502] = "upstream-failed", [503] = "backend-away", [504] = "upstream-timeout",
}

-- Statuses of nginx's own that the detail of their code says too little about
local DETAILS = {
    [497] = "This port speaks HTTPS; the request came as plain HTTP.",
}

-- States whose estimate is a time left of a start or a backoff, not of a start that may begin later
local RUNS_DOWN = { waking = true, failed = true }

local _M = {}

--- The code for a status nginx itself came up with, and what to say of it if there is more to say.
function _M.code_of(status)
    return BY_STATUS[status] or (status < 500 and "bad-request" or "internal"), DETAILS[status]
end

--- Seconds for the Retry-After of a code: what the client is told (at most 60), and the true
--- estimate, to the millisecond.
function _M.retry_after(code, estimate)
    local entry = CODES[code]
    if not entry.retry then
        return nil
    end
    local true_value = entry.retry == "estimate" and (estimate or entry.default) or entry.retry
    return min(RETRY_LIMIT, max(1, ceil(true_value))), floor(true_value * 1000 + 0.5) / 1000
end

--- Status, headers and body of a problem. `facts`: detail, param, service, state, reason, log,
--- estimate, private (the client may see log lines and reasons), shape (see shapes), allow, headers
--- (more of them).
function _M.render(code, facts)
    local entry = CODES[code]
    local retry, true_retry = _M.retry_after(code, facts.estimate)
    local text, content_type = shapes.render(facts.shape, {
        code = code, status = entry.status, title = entry.title,
        detail = facts.detail or entry.detail, param = facts.param, service = facts.service,
        state = facts.state, reason = facts.reason, retry_after_s = true_retry,
        -- An empty list would be written as an object.
        log = facts.private and facts.log and facts.log[1] and facts.log or nil,
    })
    local headers = {
        ["Content-Type"] = content_type,
        ["Content-Length"] = #text,
        ["Retry-After"] = retry,
        ["Allow"] = facts.allow,
        ["WWW-Authenticate"] = entry.challenge,
        ["Cache-Control"] = "no-store",
    }
    for name, value in pairs(facts.headers or {}) do
        headers[name] = value
    end
    return entry.status, headers, text
end

-- What is left of an estimate of a moment `age` seconds ago
local function left_of(estimate, age)
    -- The moment is rounded to milliseconds, also upwards.
    return estimate and max(1, estimate - max(0, age))
end

--- Facts about a service for `render`, `now` on the clock of its `told_at`. People outside the
--- private networks learn the state and the class of the reason, never words that may name a node
--- or a job.
function _M.service_facts(service, private, code, now)
    local refusal = service.refusal
    -- Only where something is under way does its end come nearer.
    local age = RUNS_DOWN[service.state] and now - service.told_at or 0
    local facts = {
        service = service.name, state = service.state, private = private,
        estimate = left_of(service.retry_after_s, age),
    }
    if refusal and refusal.code == code then
        facts.estimate = left_of(refusal.retry_after_s, age) or facts.estimate
        facts.reason = private and refusal.reason or code
        facts.log = refusal.log
    elseif private then
        facts.reason = service.reason
    end
    return facts
end

--- Answer the current request with a problem and end it. Does not return.
function _M.send(code, facts)
    local var = ngx.var
    facts.shape = var.sg_api
    if facts.shape == "" then -- nginx may refuse a request before Lua has seen it
        facts.shape = shapes.of((var.request_uri or ""):match("^[^?]*"))
    end
    local status, headers, text = _M.render(code, facts)
    var.sg_problem = code
    -- Empty ones add no header: this answer went through no service.
    local waited = var.sg_waited
    var.sg_refused = var.sg_service
    var.sg_service = ""
    var.sg_waited = ""
    -- A body left unread would be taken for the next request of this connection.
    ngx.req.discard_body()
    ngx.status = status
    for name, value in pairs(headers) do
        ngx.header[name] = value
    end
    ngx.print(text)
    var.sg_waited = waited -- for the access log
    return ngx.exit(ngx.HTTP_OK)
end

return _M
