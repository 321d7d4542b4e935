local cjson = require "cjson.safe"
local problem = require "gate.problem"

local function render(code, facts)
    local status, headers, text = problem.render(code, facts or {})
    return status, headers, cjson.decode(text)
end

describe("a problem", function()
    it("has type, title, status and detail", function()
        local status, headers, body = render("no-such-route")
        assert.are.equal(404, status)
        assert.are.equal("application/problem+json", headers["Content-Type"])
        assert.are.equal("no-such-route", body.type:match("[^/]+$"))
        assert.are.equal(404, body.status)
        assert.is_string(body.title)
        assert.is_string(body.detail)
        assert.is_nil(headers["Retry-After"])
    end)

    it("says Retry-After of at most 60, and the true estimate in the body", function()
        local _, headers, body = render("hold-timeout", { estimate = 200.5 })
        assert.are.equal(60, headers["Retry-After"])
        assert.are.equal(200.5, body.retry_after_s)
    end)

    it("says Retry-After of at least 1, in whole seconds", function()
        assert.are.equal(1, (problem.retry_after("start-failed", 0.2)))
        assert.are.equal(3, (problem.retry_after("start-failed", 2.1)))
        assert.are.equal(59.988, select(2, problem.retry_after("too-many-requests", 59.98787)))
    end)

    it("is a line of JSON with plain slashes", function()
        local _, headers, text = problem.render("no-such-route", { detail = "a\\/b" })
        assert.are.equal("a\\/b", cjson.decode(text).detail)
        assert.is_nil(text:find("problems\\/", 1, true))
        assert.are.equal("}\n", text:sub(-2))
        assert.are.equal(#text, headers["Content-Length"])
    end)

    it("has no list of log lines when there are none", function()
        assert.is_nil(select(3, render("start-failed", { private = true, log = {} })).log)
        local _, _, body = render("start-failed", { private = true, log = { "boom" } })
        assert.are.same({ "boom" }, body.log)
    end)

    it("has the shape of the OpenAI API where that is spoken", function()
        local _, headers, body = render("no-such-model", { shape = "openai" })
        assert.are.equal("application/json", headers["Content-Type"])
        assert.are.equal("no-such-model", body.error.code)
        assert.are.equal("invalid_request_error", body.error.type)
        assert.are.equal(cjson.null, body.error.param)
        assert.is_string(body.error.message)
    end)

    it("names the methods that are allowed", function()
        local _, headers = render("method-not-allowed", { allow = "POST" })
        assert.are.equal("POST", headers.Allow)
    end)
end)

describe("what is said about a service", function()
    local service = {
        name = "LLM", state = "failed", reason = "on node gpu07", retry_after_s = 9, told_at = 100,
        refusal = { code = "start-failed", reason = "killed on gpu07", log = { "boom" },
            retry_after_s = 4 },
    }

    it("is everything for private networks", function()
        local facts = problem.service_facts(service, true, "start-failed", 100)
        local _, headers, body = render("start-failed", facts)
        assert.are.equal("killed on gpu07", body.reason)
        assert.are.same({ "boom" }, body.log)
        assert.are.equal(4, headers["Retry-After"])
    end)

    it("is state and class of the reason for others", function()
        local facts = problem.service_facts(service, false, "start-failed", 100)
        local _, _, body = render("start-failed", facts)
        assert.are.equal("failed", body.state)
        assert.are.equal("start-failed", body.reason)
        assert.is_nil(body.log)
        assert.is_nil(problem.service_facts(service, false, "hold-timeout", 100).reason)
    end)
end)

describe("an estimate", function()
    local function estimate(state, code, now)
        local service = {
            name = "LLM", state = state, retry_after_s = 9, told_at = 100,
            refusal = { code = "start-failed", retry_after_s = 4 },
        }
        return problem.service_facts(service, true, code, now).estimate
    end

    it("runs down while a start or a backoff does, to one second", function()
        assert.are.equal(2.5, estimate("failed", "start-failed", 101.5))
        assert.are.equal(6, estimate("waking", "hold-timeout", 103))
        assert.are.equal(1, estimate("waking", "hold-timeout", 200))
        assert.are.equal(4, estimate("failed", "start-failed", 99.9996))
    end)

    it("stays as it was told where nothing is under way", function()
        assert.are.equal(9, estimate("cold", "hold-timeout", 200))
        assert.are.equal(4, estimate("disabled", "start-failed", 200))
    end)
end)

describe("a status of nginx's own", function()
    it("has a code", function()
        assert.are.equal("body-too-large", problem.code_of(413))
        assert.are.equal("bad-request", problem.code_of(411))
        assert.are.equal("internal", problem.code_of(500))
        assert.are.equal("bad-request", (problem.code_of(497)))
        assert.is_truthy(select(2, problem.code_of(497)):find("HTTPS", 1, true))
    end)
end)
