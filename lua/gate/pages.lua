-- The gate's own pages: whether it lives, and the backend's pages with a copy kept for half a
-- second, so that nobody's curiosity delays the backend. Per worker: fetches under way, which
-- others wait for. Shared (through the store): the copies.

local semaphore = require "ngx.semaphore"

local http = require "gate.http"
local problem = require "gate.problem"
local registry = require "gate.registry"
local settings = require "gate.settings"
local store = require "gate.store"

local tonumber = tonumber

local KEEP_S = 0.5
local FETCH_TIMEOUT_S = 10
local PAGE_LIMIT = 64 * 1024 * 1024

local fetching = {} -- page key → {semaphore, waiting, text}

local _M = {}

local function answer(status, content_type, body)
    ngx.req.discard_body()
    ngx.status = status
    ngx.header["Content-Type"] = content_type
    ngx.header["Content-Length"] = #body
    ngx.header["Cache-Control"] = "no-store"
    ngx.print(body)
    return ngx.exit(ngx.HTTP_OK)
end

local function fetch(uri, private)
    local page, err = http.request {
        endpoint = "unix:" .. settings.api_socket, method = "GET", path = uri,
        headers = { ["X-Slurmgate-Private"] = private }, timeout = FETCH_TIMEOUT_S,
        limit = PAGE_LIMIT, keepalive = true,
    }
    if not page then
        return nil, err
    end
    local content_type = page.headers["content-type"] or "application/json"
    return page.status .. " " .. content_type .. "\n" .. page.body
end

local function fetch_for_all(key, uri, private)
    local job = { semaphore = semaphore.new(0), waiting = 0 }
    fetching[key] = job
    local done, text, err = pcall(fetch, uri, private)
    fetching[key] = nil
    if not done then
        text, err = nil, text
    end
    if text then
        store.keep_page(key, text, KEEP_S)
    else
        ngx.log(ngx.WARN, "page ", uri:match("^[^?]*"), ": ", err)
    end
    job.text = text
    if job.waiting > 0 then
        job.semaphore:post(job.waiting)
    end
    return text
end

local function wait_for(job)
    job.waiting = job.waiting + 1
    job.semaphore:wait(FETCH_TIMEOUT_S)
    return job.text
end

local function backend_page(var)
    local uri, private = var.request_uri, var.sg_private
    local key = private .. uri
    local text = store.page(key)
    if not text then
        local job = fetching[key]
        text = job and wait_for(job)
        text = text or fetch_for_all(key, uri, private)
    end
    if not text then
        return problem.send("backend-away", {})
    end
    local line_end = text:find("\n", 1, true)
    local status, content_type = text:sub(1, line_end - 1):match("^(%d+) (.*)$")
    return answer(tonumber(status), content_type, text:sub(line_end + 1))
end

local function reading(var)
    local method = var.request_method
    return method == "GET" or method == "HEAD"
end

local function admin(var)
    if var.request_method ~= "POST" then
        return problem.send("method-not-allowed", { allow = "POST" })
    end
    if (tonumber(var.http_content_length) or 0) > settings.admin_max_body then
        return problem.send("body-too-large", {})
    end
    return ngx.exec("@api")
end

--- Answer a request for one of the gate's own pages; `kind` as router.match says. Does not return.
function _M.answer(var, kind)
    if kind == "admin" then
        return admin(var)
    elseif kind == "openai" then
        return problem.send("no-such-route", {})
    elseif not reading(var) then
        return problem.send("method-not-allowed", { allow = "GET, HEAD" })
    elseif kind == "healthz" then
        return answer(200, "application/json", '{"status":"ok"}\n')
    elseif kind == "readyz" then
        -- Another worker may have taken the first snapshot a moment ago.
        registry.refresh()
        if not registry.version() then
            return problem.send("not-ready", {})
        end
        return answer(200, "application/json", '{"status":"ready"}\n')
    elseif kind == "metrics" and var.sg_private ~= "1" then
        return problem.send("forbidden", {})
    end
    return backend_page(var)
end

return _M
