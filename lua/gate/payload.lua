-- What the gate wants to know of a request's body: the model it names, whether it asks for an event
-- stream, and how its prompt begins; and another model put into it. Long bodies are read in pieces,
-- and the worker serves others between them. Per worker: the buffer for pieces of files, which is
-- empty whenever something yields.
--
-- inspect(var) → found, or nil, code ("bad-body" with a detail, "internal"). The body must have
-- been read (ngx.req.read_body). May yield where it is long. multipart/form-data is read as such,
-- everything else as JSON. found:
--   model          string, or nil: then
--   model_problem  says why there is none ('"model" is missing', …), for whoever needs one
--   stream         boolean: "stream": true
--   place          CRC-32 of the first 256 raw bytes of the value of "messages", else of "prompt",
--                  else of "input" (a string, list or object); nil if there is none
--
-- rename(found, name) → true, or nil, code ("internal"). Puts another model in the place of the
-- one found. May yield. The length in the header follows; what is replayed later is the new body.
-- Not to be called twice with the same `found`.

local ffi = require "ffi"

local body_file = require "gate.body_file"
local clock = require "gate.clock"
local json = require "gate.json"
local multipart = require "gate.multipart"
local scanner = require "gate.scanner"

local C = ffi.C
local lower, sub = string.lower, string.sub
local append = ngx.req.append_body
local cast, text_at = ffi.cast, ffi.string
local max, min = math.max, math.min

local PIECE = 65536  -- memory of more at once is given back each time, and costs page faults
local TURN_S = 0.0015 -- of work before others get their turn: a small request needs several
-- Debian's nginx warns of each sleep of nothing. One of a millisecond is at once over on a worker
-- with other work, because nginx counts it from the beginning of our turn.
local PAUSE_S = 0.001
local ENCODED = "the body has a Content-Encoding; send it without one"

ffi.cdef [[
size_t sg_read(void *to, size_t size, size_t count, void *file) __asm__("fread");
int sg_read_failed(void *file) __asm__("ferror");
]]

local buffer = ffi.new("uint8_t[?]", PIECE)

local _M = {}

-- Pieces -------------------------------------------------------------------------------------

-- Others' turn, if ours is over; returns when the next one is.
local function breathe(until_s)
    if clock.now() < until_s then
        return until_s
    end
    ngx.sleep(PAUSE_S)
    return clock.now() + TURN_S
end

local function each_of_text(text, take, taker)
    local p, n = cast("const uint8_t *", text), #text
    taker.text = text -- what is pointed into must not be collected
    if n <= PIECE then
        return take(taker, p, n)
    end
    local until_s = clock.now() + TURN_S
    for at = 0, n - 1, PIECE do
        local ok, why = take(taker, p + at, min(PIECE, n - at))
        if not ok then
            return nil, why
        end
        until_s = breathe(until_s)
    end
    return true
end

-- A file that is left open, because the client went away during a yield, is closed by the
-- collector.
local function each_of_file(file, take, taker)
    file:setvbuf("no")
    local until_s = clock.now() + TURN_S
    while true do
        local n = tonumber(C.sg_read(buffer, 1, PIECE, file))
        if n == 0 then
            assert(C.sg_read_failed(file) == 0, "a body's file cannot be read")
            return true
        end
        local ok, why = take(taker, cast("const uint8_t *", buffer), n)
        if not ok then
            return nil, why
        end
        until_s = breathe(until_s)
    end
end

-- The file of a body that is in one; nil if it is in none, nil and a code if it cannot be read. Why
-- is for the log: it may tell where files lie.
local function open_body()
    local file, why = body_file.open()
    if why then
        ngx.log(ngx.ERR, "open the file of a body: ", why)
        return nil, "internal"
    end
    return file
end

-- Gives the body to `take(taker, pointer, length)`, piece by piece, until that says nil and why.
-- Returns true, or nil, code, and what is wrong if that is the body.
local function each_piece(take, taker)
    local ok, why
    local text = ngx.req.get_body_data()
    if text then
        ok, why = each_of_text(text, take, taker)
        return ok, "bad-body", why
    end
    local file, code = open_body()
    if not file then
        return not code, code
    end
    ok, why = each_of_file(file, take, taker)
    file:close()
    return ok, "bad-body", why
end

-- Looking ------------------------------------------------------------------------------------

-- Which module reads such a body, and its reader.
local function reader_for(content_type)
    if not content_type or not multipart.is(content_type) then
        return scanner, scanner.new()
    end
    local reader, why = multipart.new(content_type)
    if reader then
        reader.form = true
    end
    return multipart, reader, why
end

--- See the top.
function _M.inspect(var)
    local encoding = var.http_content_encoding
    if encoding and lower(encoding) ~= "identity" then
        return nil, "bad-body", ENCODED
    end
    local kind, reader, why = reader_for(var.content_type)
    if not reader then
        return nil, "bad-body", why
    end
    local ok, code
    ok, code, why = each_piece(kind.feed, reader)
    if not ok then
        return nil, code, why
    end
    ok, why = kind.finish(reader)
    if not ok then
        return nil, "bad-body", why
    end
    return reader
end

-- Renaming -----------------------------------------------------------------------------------

-- Copies a piece into the new body, without what lies in the model's place.
local function copy(self, p, n)
    local at, found = self.at, self.found
    self.at = at + n
    if at < found.from then
        append(text_at(p, min(n, found.from - at)))
    end
    if at <= found.from and found.from < at + n then
        append(self.name)
    end
    if at + n > found.to then
        local from = max(0, found.to - at)
        append(text_at(p + from, n - from))
    end
    return true
end

-- The old file is opened first: to begin a new body deletes it.
local function rename_in_file(found, name)
    local file, code = open_body()
    if not file then
        return nil, code or "internal"
    end
    ngx.req.init_body(PIECE)
    each_of_file(file, copy, { at = 0, found = found, name = name })
    ngx.req.finish_body()
    file:close()
    return true
end

--- See the top.
function _M.rename(found, name)
    if not found.form then
        name = json.encode(name)
    end
    local text = ngx.req.get_body_data()
    if not text then
        return rename_in_file(found, name)
    end
    ngx.req.set_body_data(sub(text, 1, found.from) .. name .. sub(text, found.to + 1))
    return true
end

return _M
