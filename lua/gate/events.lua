-- What the gate itself writes into an event stream, and who wants one by its Accept header. Pure:
-- loads without nginx, has no state.

local cjson = require "cjson.safe"

local json = require "gate.json"
local shapes = require "gate.shapes"

local ceil = math.ceil
local encode = json.encode
local find = string.find
local format = string.format
local ipairs = ipairs
local type = type

local NOT_A_STREAM = "The service answered no event stream."
-- Of its own, because others may read numbers that JSON does not have.
local strict = cjson.new()
strict.decode_invalid_numbers(false)

local _M = {}

-- Who wants a stream --------------------------------------------------------------------------

--- Whether an Accept header (a line, a list of lines, or nil) has text/event-stream and nothing
--- else but */*.
function _M.only_stream(accept)
    local lines = type(accept) == "table" and accept or { accept }
    local stream = false
    for _, line in ipairs(lines) do
        for item in line:gmatch("[^,]+") do
            local kind = item:match("^%s*([^%s;]*)"):lower()
            if kind == "text/event-stream" then
                stream = true
            elseif kind ~= "*/*" and kind ~= "" then
                return false
            end
        end
    end
    return stream
end

--- Whether a content type is that of an event stream.
function _M.is_stream(content_type)
    local kind = (content_type or ""):match("^%s*([^%s;]*)")
    return kind:lower() == "text/event-stream"
end

-- Comment lines -------------------------------------------------------------------------------

local function word(name, value)
    if type(value) == "string" and find(value, "^[A-Za-z0-9_]+$") then
        return " " .. name .. "=" .. value
    end
    return ""
end

--- The comment line of a request that waits. `state` and `reason` are said if they are one plain
--- word each; `seconds` may be nil.
function _M.waiting(state, reason, seconds)
    local eta = seconds and format(" eta_s=%d", ceil(seconds)) or ""
    return ": waiting" .. word("state", state) .. word("reason", reason) .. eta .. "\n\n"
end

-- Errors --------------------------------------------------------------------------------------

local TWO = "[\194-\223][\128-\191]"
local THREE = { "\224[\160-\191][\128-\191]", "[\225-\236\238\239][\128-\191][\128-\191]",
    "\237[\128-\159][\128-\191]" }
local FOUR = { "\240[\144-\191][\128-\191][\128-\191]",
    "[\241-\243][\128-\191][\128-\191][\128-\191]", "\244[\128-\143][\128-\191][\128-\191]" }

-- The text if it is UTF-8, else without what is not ASCII: whoever reads events reads UTF-8.
local function readable(text)
    local rest = text
    -- Long ones first: what is left of them must not pass for shorter ones.
    for _, pattern in ipairs { FOUR[1], FOUR[2], FOUR[3], THREE[1], THREE[2], THREE[3], TWO } do
        rest = rest:gsub(pattern, ".")
    end
    return find(rest, "[\128-\255]") and text:gsub("[\128-\255]", "?") or text
end

local function text_of(value)
    return type(value) == "string" and value or nil
end

local function table_of(value)
    return type(value) == "table" and value or {}
end

-- What an answer says about an error, in any of the shapes there are
local function understand(body)
    local parsed = table_of(strict.decode(body))
    local inner = table_of(parsed.error)
    local kind = text_of(parsed.type) or ""
    return {
        message = text_of(inner.message) or text_of(parsed.error) or text_of(parsed.detail)
            or text_of(parsed.message),
        type = text_of(inner.type), param = text_of(inner.param),
        code = text_of(inner.code) or text_of(parsed.code) or kind:match("/problems/(.+)$"),
    }
end

-- JSON stays as it is, on one line: line ends within it can only stand between its parts.
local function embed(body)
    if body ~= "" and strict.decode(body) ~= nil then
        return (body:gsub("%c+", " "))
    end
    return encode(body)
end

local function optional(value)
    return value and encode(value) or "null"
end

--- The event that ends a stream whose service answered something else than a stream, in the shape
--- of an API ("anthropic", everything else as OpenAI's).
function _M.failure(api, status, body)
    body = readable(body)
    local said = understand(body)
    local message = said.message
        or (status < 400 and NOT_A_STREAM or format("The service answered %d.", status))
    local embedded, kind = embed(body), said.type or shapes.kind(api, status)
    if api == "anthropic" then
        return format('event: error\ndata: {"type":"error","error":{"type":%s,"message":%s},'
            .. '"status":%d,"body":%s}\n\n', encode(kind), encode(message), status, embedded)
    end
    return format('data: {"error":{"message":%s,"type":%s,"code":%s,"param":%s,"status":%d,'
        .. '"body":%s}}\n\n', encode(message), encode(kind), optional(said.code),
        optional(said.param), status, embedded)
end

return _M
