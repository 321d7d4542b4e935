-- Reads a multipart/form-data body in pieces, as they come, and keeps what the gate wants to know:
-- the values of the parts named `model` and `stream`. Parts may come in any order, a large file
-- first. What services may read in different ways is refused. No state; a reader is its caller's.

local ffi = require "ffi"

local json_text = require "gate.json_text"

local byte, find, format, gsub = string.byte, string.find, string.format, string.gsub
local lower, match, sub = string.lower, string.match, string.sub
local max = math.max
local text_at = ffi.string

local MAX_BOUNDARY = 200 -- 70 by the standard
local MAX_LINE = 64      -- blanks behind a delimiter
local MAX_HEADERS = 16384
local MAX_VALUE = 4096
local MAX_PARTS = 2000

local SMALL_M, LARGE_M = 0x6d, 0x4d
local YES = { ["true"] = true, ["1"] = true }

local _M = {}

-- Headers ------------------------------------------------------------------------------------

-- A parameter's value at `at`, and where the text goes on; nil if it is not one.
local function parameter_value(text, at)
    if sub(text, at, at) ~= '"' then
        local value, behind = match(text, "^([^%s;\"]+)()", at)
        return value, behind
    end
    local from = at + 1
    repeat
        at = find(text, '["\\]', at + 1)
        if not at then
            return nil
        end
        local quote = sub(text, at, at) == '"'
        at = quote and at or at + 1
    until quote
    return (gsub(sub(text, from, at - 1), '\\(["\\])', "%1")), at + 1
end

-- The parameters of a header's value: name → value; nil if they cannot be read, or one is there
-- twice.
local function parameters(text)
    local found = {}
    local at = find(text, ";", 1, true)
    while at do
        local name, from = match(text, "^;%s*([^%s=;\"]+)%s*=%s*()", at)
        if not name then
            -- A semicolon may end the header.
            return find(text, "^;%s*$", at) and found or nil
        end
        local value, behind = parameter_value(text, from)
        name = lower(name)
        -- Some readers prefer "name*" to "name".
        if not value or found[name] or (sub(name, -1) == "*" and name ~= "filename*") then
            return nil
        end
        found[name] = value
        at = find(text, "%S", behind)
        if at and sub(text, at, at) ~= ";" then
            return nil
        end
    end
    return found
end

-- The name of the part with these headers, and whether it is a file; nil if they tell no name.
local function part_name(headers)
    headers = gsub(headers, "\r\n[ \t]+", " ") .. "\r\n"
    local disposition
    for line in headers:gmatch("(.-)\r\n") do
        local name, value = match(line, "^([^%s:]+):%s*(.*)$")
        if name and lower(name) == "content-disposition" then
            if disposition then
                return nil
            end
            disposition = value
        elseif not name and line ~= "" then
            return nil
        end
    end
    local found = disposition and lower(match(disposition, "^[^;%s]*")) == "form-data"
        and parameters(disposition)
    if not found or not found.name then
        return nil
    end
    return found.name, found.filename ~= nil or found["filename*"] ~= nil
end

-- Reading ------------------------------------------------------------------------------------

--- Whether a Content-Type is that of a form of parts.
function _M.is(content_type)
    local first = byte(content_type)
    -- Most bodies are JSON, and this is much quicker than a pattern.
    return (first == SMALL_M or first == LARGE_M)
        and find(lower(content_type), "^multipart/form%-data%f[^%w]") ~= nil
end

--- A reader for a body with this Content-Type, or nil and what is wrong. After all was fed and
--- `finish` said true: model, model_problem, from, to, stream, as the scanner's.
function _M.new(content_type)
    local found = parameters(content_type)
    local boundary = found and found.boundary
    if not boundary or #boundary > MAX_BOUNDARY or find(boundary, "[%c\128-\255]") then
        return nil, "multipart/form-data without a usable boundary"
    end
    return {
        delimiter = "\r\n--" .. boundary, step = "skip", part = 0,
        -- The first delimiter needs no line end before it.
        rest = "\r\n", offset = -2,
        model = nil, model_problem = nil, model_seen = false, from = nil, to = nil, stream = false,
        wanted = nil,
    }
end

local steps = {}

-- Each step gets the bytes not used yet and where in them to go on. It returns where the next one
-- goes on; or nil and from where on bytes must be kept for when more have come; or nil, nil and
-- what is wrong.

-- The body of a part that is of no interest
function steps.skip(self, data, at)
    local delimiter = self.delimiter
    local from, to = find(data, delimiter, at, true)
    if not from then
        return nil, max(at, #data - #delimiter + 2)
    end
    self.step = "line"
    return to + 1
end

-- What is left of the line of a delimiter
function steps.line(self, data, at)
    if sub(data, at, at + 1) == "--" then
        self.step = "over"
        return at + 2
    end
    local from, to = find(data, "^[ \t]*\r\n", at)
    if from then
        self.step = "headers"
        -- There may be no headers at all; so theirs begin with this line's end.
        return to - 1
    elseif #data - at < MAX_LINE and find(data, "^%-?[ \t]*\r?$", at) then
        return nil, at
    end
    return nil, nil, format("unreadable delimiter behind part %d", self.part)
end

local function begin_part(self, name, file)
    self.step = "skip"
    if name == "model" then
        if self.model_seen then
            self.model, self.model_problem = nil, '"model" is given twice'
            return
        end
        self.model_seen = true
        if file then
            self.model_problem = '"model" must be a string, got a file'
            return
        end
    elseif name ~= "stream" or file then
        return
    end
    self.step, self.wanted = "value", name
end

function steps.headers(self, data, at)
    local from, to = find(data, "\r\n\r\n", at, true)
    if (from or #data) - at > MAX_HEADERS then
        return nil, nil, format("the headers of part %d are too long", self.part + 1)
    elseif not from then
        return nil, at
    end
    self.part = self.part + 1
    if self.part > MAX_PARTS then
        return nil, nil, format("more than %d parts", MAX_PARTS)
    end
    local name, file = part_name(sub(data, at + 2, from - 1))
    if not name then
        return nil, nil, format("part %d has no readable name", self.part)
    end
    begin_part(self, name, file)
    return to + 1
end

local function take_model(self, value, from)
    self.from, self.to = from, from + #value
    if #value > MAX_VALUE then
        self.model_problem = format('"model" is longer than %d bytes', MAX_VALUE)
    elseif not json_text.is_utf8(value) then
        self.model_problem = '"model" is not UTF-8'
    else
        self.model = value
    end
end

-- The body of a part of interest
function steps.value(self, data, at)
    local from = find(data, self.delimiter, at, true)
    if not from and #data - at <= MAX_VALUE + #self.delimiter then
        return nil, at
    end
    local value = sub(data, at, from and from - 1 or at + MAX_VALUE)
    if self.wanted == "model" then
        take_model(self, value, self.offset + at - 1)
    else
        self.stream = YES[lower(value)] or false
    end
    self.step = "skip"
    return from or at
end

-- Behind the last delimiter
function steps.over(_, data)
    return nil, #data + 1
end

--- Read the next `n` bytes at `p` (a pointer to uint8_t). True, or nil and what is wrong. Never
--- yields.
function _M.feed(self, p, n)
    local data = self.rest .. text_at(p, n)
    local at = 1
    while true do
        local next_at, keep, why = steps[self.step](self, data, at)
        if why then
            return nil, "not a form: " .. why
        elseif not next_at then
            self.rest = sub(data, keep)
            self.offset = self.offset + keep - 1
            return true
        end
        at = next_at
    end
end

--- All was fed. True, or nil and what is wrong.
function _M.finish(self)
    if self.step ~= "over" then
        return nil, format("not a form: it ends too early, behind part %d", self.part)
    end
    if not self.model_seen then
        self.model_problem = '"model" is missing'
    end
    return true
end

return _M
