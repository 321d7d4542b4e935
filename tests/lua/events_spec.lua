local cjson = require "cjson.safe"
local events = require "gate.events"

local function data_of(text)
    assert.are.equal("\n\n", text:sub(-2))
    local lines = text:gsub("^event: error\n", "")
    return cjson.decode(lines:match("^data: ([^\n]*)\n\n$"))
end

local function error_of(status, body)
    return data_of(events.failure("openai", status, body)).error
end

describe("an Accept header", function()
    it("asks for a stream when that is all it names", function()
        assert.is_true(events.only_stream("text/event-stream"))
        assert.is_true(events.only_stream(" Text/Event-Stream ; q=0.9,*/*;q=0.1"))
        assert.is_true(events.only_stream { "text/event-stream", "*/*" })
    end)

    it("does not when other things will do", function()
        for _, accept in ipairs { "*/*", "", "text/*", "application/json, text/event-stream" } do
            assert.is_false(events.only_stream(accept))
        end
        assert.is_false(events.only_stream(nil))
        assert.is_false(events.only_stream { "text/event-stream", "text/html" })
    end)
end)

describe("a comment line", function()
    it("says state, reason and time left", function()
        assert.are.equal(": waiting state=pending reason=Resources eta_s=120\n\n",
            events.waiting("pending", "Resources", 119.2))
    end)

    it("says only plain words", function()
        assert.are.equal(": waiting\n\n", events.waiting())
        assert.are.equal(": waiting state=running\n\n",
            events.waiting("running", "node7 down\ndata: x", nil))
        assert.are.equal(": waiting\n\n", events.waiting(cjson.null, "", nil))
    end)
end)

describe("the event of a failure", function()
    it("has what OpenAI's clients look for, the status and the body", function()
        local said = error_of(404, '{"error": {"message": "no m", "code": "x", "param": "model"}}')
        assert.are.same({
            message = "no m", type = "invalid_request_error", code = "x", param = "model",
            status = 404, body = { error = { message = "no m", code = "x", param = "model" } },
        }, said)
    end)

    it("has Anthropic's shape there", function()
        local body = '{"type":"error","error":{"type":"o","message":"m"}}'
        local text = events.failure("anthropic", 529, body)
        assert.is_truthy(text:find("^event: error\n"))
        local event = data_of(text)
        assert.are.equal("error", event.type)
        assert.are.same({ type = "o", message = "m" }, event.error)
        assert.are.equal(529, event.status)
        assert.are.same({ type = "o", message = "m" }, event.body.error)
    end)

    it("finds the words of problems and of what servers in Python say", function()
        local problem = '{"type": "https://x/problems/start-failed", "detail": "It ended."}'
        assert.are.equal("start-failed", error_of(503, problem).code)
        assert.are.equal("It ended.", error_of(503, problem).message)
        assert.are.equal("no", error_of(500, '{"error": "no"}').message)
        assert.are.equal("The service answered 500.", error_of(500, '{"detail": [1]}').message)
        assert.are.equal("The service answered 500.", error_of(500, "null").message)
    end)

    it("keeps JSON as it came, on one line", function()
        local text = events.failure("", 500, '{"a": [],\r\n "b": 1.50,\n\n"c": {}}\n')
        assert.is_truthy(text:find('"body":{"a": [],  "b": 1.50, "c": {}} }}', 1, true))
    end)

    it("makes a string of everything else", function()
        for _, body in ipairs { "", "oops\n\ndata: x", '{"a": NaN}', '{"cut": "of', "{} {}" } do
            local text = events.failure("", 500, body)
            assert.are.equal(#text - 1, (text:find("\n", 1, true)))
            assert.are.equal(body, data_of(text).error.body)
        end
    end)

    it("is UTF-8, whatever the body is", function()
        assert.are.equal("gr\195\188n", error_of(500, "gr\195\188n").body)
        assert.are.equal("gr?n", error_of(500, "gr\252n").body)
    end)

    it("of an answer that is no error says so", function()
        local said = error_of(200, '{"id": 1}')
        assert.are.equal("server_error", said.type)
        assert.are.equal(200, said.status)
        assert.is_truthy(said.message:find("no event stream", 1, true))
    end)
end)
