-- The gate's own pages: whether it lives, and the backend's pages. A copy of those is kept for half
-- a second and serves as long as nothing changed; within that time a page is fetched a few times at
-- most, whoever comes then waits and shares the next. So nobody's curiosity delays the backend, and
-- nobody sees less than what the gate had done before he asked. Per worker: fetches under way.
-- Shared (through the store): the copies, and how often each was fetched.

local cjson = require "cjson.safe"
local semaphore = require "ngx.semaphore"

local activity = require "gate.activity"
local clock = require "gate.clock"
local http = require "gate.http"
local json = require "gate.json"
local notifier = require "gate.notifier"
local problem = require "gate.problem"
local registry = require "gate.registry"
local routing = require "gate.routing"
local settings = require "gate.settings"
local store = require "gate.store"

local concat = table.concat
local encode = json.encode
local format = string.format
local ipairs = ipairs
local sleep = ngx.sleep
local timer_at = ngx.timer.at
local tonumber = tonumber

local KEEP_S = 0.5
local FETCHES = 4 -- of one page within that time
local TURN_LOOK_S = 0.02
local JOBS = 4    -- waited for at most: one that began before the request came may not do
local FETCH_TIMEOUT_S = 10
local JOB_TIMEOUT_S = FETCH_TIMEOUT_S + 2
local PAGE_LIMIT = 64 * 1024 * 1024
local NEVER = "1970-01-01T00:00:00Z" -- nobody knows when a model was made

local fetching = {} -- page key → job

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

-- What a page shows is the same as long as this is: the snapshot, what the backend was told by
-- operators, the counts of requests.
local function mark_now()
    return (store.version() or "") .. "," .. store.outdated() .. "," .. activity.mark()
end

local function do_job(job)
    while not store.may_fetch(job.key, FETCHES, KEEP_S) do
        sleep(TURN_LOOK_S)
    end
    job.began = clock.now()
    job.mark = mark_now()
    notifier.confirm(0)
    local text, err = fetch(job.path, job.private)
    if text then
        store.keep_page(job.key, text, job.began, job.mark, KEEP_S)
    end
    return text, err
end

-- Runs in a timer: a client that leaves takes nobody's answer with it.
local function run(_, job)
    local done, text, err = pcall(do_job, job)
    if not done then
        text, err = nil, text
    end
    if not text then
        ngx.log(ngx.WARN, "page ", job.path, ": ", err)
    end
    job.text, job.failed = text, not text
    fetching[job.key] = nil
    if job.waiting > 0 then
        job.semaphore:post(job.waiting)
    end
end

local function start(key, path, private)
    local job = {
        key = key, path = path, private = private, semaphore = semaphore.new(0), waiting = 0,
    }
    local ok, err = timer_at(0, run, job)
    if not ok then
        ngx.log(ngx.WARN, "page timer: ", err)
        return nil
    end
    fetching[key] = job
    return job
end

local function kept(key, arrived)
    local text, began, mark = store.page(key)
    if text and (began >= arrived or mark == mark_now()) then
        return text
    end
    return nil
end

-- A page as it was when the request came, or later.
local function page_since(key, path, private, arrived)
    for _ = 1, JOBS do
        local text = kept(key, arrived)
        if text then
            return text
        end
        local job = fetching[key] or start(key, path, private)
        if not job then
            return nil
        end
        job.waiting = job.waiting + 1
        job.semaphore:wait(JOB_TIMEOUT_S)
        if job.failed then
            return nil
        elseif job.text and (job.began >= arrived or job.mark == mark_now()) then
            return job.text
        end
    end
    return nil
end

local function backend_page(var)
    local path, private = var.request_uri:match("^[^?]*"), var.sg_private
    local text = page_since(private .. path, path, private, clock.now())
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
    if var.sg_private ~= "1" then
        return problem.send("forbidden", {})
    elseif var.request_method ~= "POST" then
        return problem.send("method-not-allowed", { allow = "POST" })
    end
    if (tonumber(var.http_content_length) or 0) > settings.admin_max_body then
        return problem.send("body-too-large", {})
    end
    store.outdate_pages()
    var.sg_admin = "1"
    notifier.hurry()
    return ngx.exec("@api")
end

-- One entry in the shapes of both OpenAI and Anthropic, whose clients each look at their own fields
local function model_entry(name)
    local service = registry.by_model(name)
    return {
        id = name, object = "model", type = "model", owned_by = service.name,
        display_name = name, created = 0, created_at = NEVER, state = service.state,
    }
end

-- Written by hand around the entries: the encoder cannot tell an empty list from an object.
local function model_list(names)
    local entries = {}
    for i, name in ipairs(names) do
        entries[i] = encode(model_entry(name))
    end
    return format('{"object":"list","data":[%s],"has_more":false,"first_id":%s,"last_id":%s}\n',
        concat(entries, ","), encode(names[1] or cjson.null), encode(names[#names] or cjson.null))
end

local function models(var)
    var.sg_api = "openai"
    -- Another worker may have taken the first snapshot a moment ago.
    registry.refresh()
    if not registry.version() then
        return problem.send("not-ready", {})
    end
    local key, code = routing.caller(var)
    if code or key == false then
        return problem.send("unauthorized", {})
    end
    local name = var.request_uri:match("^/v1/models/([^?]+)")
    if not name then
        return answer(200, "application/json", model_list(routing.models_for(key)))
    end
    name = ngx.unescape_uri(name:gsub("+", "%%2B"))
    local service = registry.by_model(name)
    if not service or not routing.open_to(key, service) then
        return problem.send(routing.no_such_model(name, key))
    end
    return answer(200, "application/json", encode(model_entry(name)) .. "\n")
end

--- The backend has answered an admin call, and nobody has its answer yet.
function _M.changed()
    store.outdate_pages()
end

--- An admin call has ended, however it did; the log phase.
function _M.forget(var)
    if notifier.hurries() and var.sg_admin == "1" then
        var.sg_admin = ""
        notifier.calm_down()
    end
end

--- Answer a request for one of the gate's own pages; `kind` as router.match says. Does not return.
function _M.answer(var, kind)
    if kind == "admin" then
        return admin(var)
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
    elseif kind == "models" then
        return models(var)
    elseif kind == "metrics" and var.sg_private ~= "1" then
        return problem.send("forbidden", {})
    end
    return backend_page(var)
end

return _M
