-- Reads a JSON object in pieces, as they come, and keeps what the gate wants to know of its top
-- level: `model`, `stream`, and the beginning of `messages`, `prompt` or `input`. Accepts exactly
-- what Python's json.loads takes for an object in UTF-8 text, but for NaN and Infinity, more than
-- 1000 levels and a byte order mark, which are refused, and very long integers, which are not.
--
-- The grammar is a table: for each state and byte the next state, or what to do. So a piece may end
-- anywhere. Beside it there are short cuts for what bodies are full of, which may give up after any
-- byte and leave the rest to the table: the insides of strings, eight bytes at a time, and objects
-- of strings. No state; a reader is its caller's.

local bit = require "bit"
local ffi = require "ffi"

local grammar = require "gate.grammar"
local json_text = require "gate.json_text"

local band, bnot, bor, bxor, rshift = bit.band, bit.bnot, bit.bor, bit.bxor, bit.rshift
local char, find, format = string.char, string.find, string.format
local cast, text_at = ffi.cast, ffi.string
local crc32 = ngx.crc32_short
local min = math.min
local tonumber = tonumber

local MAX_DEPTH = 1000
local MAX_KEY = 64        -- raw bytes: all keys of interest are shorter, each letter escaped
local MAX_MODEL = 4096    -- raw bytes of a name
local PLACE_BYTES = 256

local WORD = 8
local HIGH_BITS = 0x8080808080808080ULL
local ONES = 0x0101010101010101ULL
local SPACES = 0x2020202020202020ULL
local QUOTES = 0x2222222222222222ULL
local BACKSLASHES = 0x5c5c5c5c5c5c5c5cULL

local QUOTE, COMMA, COLON, BLANK = 0x22, 0x2c, 0x3a, 0x20
local OPENING_BRACE, CLOSING_BRACE = 0x7b, 0x7d

local MODEL, STREAM, PLACE = 1, 2, 3
local INTEREST = {
    model = MODEL, stream = STREAM, messages = PLACE, prompt = PLACE + 1, input = PLACE + 2,
}
local KINDS = {
    ['"'] = "a string", ["{"] = "an object", ["["] = "a list", t = "true", f = "false", n = "null",
}

local ROW, ACTIONS, moves, scalar_top =
    grammar.ROW, grammar.ACTIONS, grammar.moves, grammar.scalar_top
local FAIL, OPEN, CLOSE, RESUME = grammar.FAIL, grammar.OPEN, grammar.CLOSE, grammar.RESUME
local TOP_KEY, KEY_END = grammar.TOP_KEY, grammar.KEY_END
local TOP_TEXT, TEXT_END = grammar.TOP_TEXT, grammar.TEXT_END
local KEY, TEXT, ITEM = grammar.KEY, grammar.TEXT, grammar.ITEM
local START, END = grammar.START, grammar.END
local key_top, text_top = grammar.key_top, grammar.text_top
local key_object, text_object, text_list =
    grammar.key_object, grammar.text_object, grammar.text_list
local begin_top, begin_object, begin_list =
    grammar.begin_top, grammar.begin_object, grammar.begin_list
local after_top, after_object, after_list =
    grammar.after_top, grammar.after_object, grammar.after_list
local colon_top, colon_object = grammar.colon_top, grammar.colon_object
local next_key, object_value, list_value =
    grammar.next_key, grammar.object_value, grammar.list_value
local between_characters, reason = grammar.between_characters, grammar.reason
local unescape = json_text.unescape

-- For each level, what comes behind a value on it. Few bodies need many levels.
local FEW_LEVELS = 32
local few_levels = ffi.typeof("uint16_t[" .. FEW_LEVELS + 1 .. "]")
local all_levels = ffi.typeof("uint16_t[" .. MAX_DEPTH + 1 .. "]")

local _M = {}

--- A reader. After all was fed and `finish` said true: model (nil if there is none that can be
--- used), model_problem (why), from and to (the bytes of the model's value: from 0, the end not
--- included), stream, place (of the beginning of its prompt).
function _M.new()
    return {
        state = START, depth = 0, offset = 0, levels = few_levels(),
        interest = nil, capturing = false, begin = 0, kept = "", limit = 0,
        model = nil, model_problem = nil, model_seen = false, from = nil, to = nil,
        stream = false, place = nil, place_of = PLACE + 3,
    }
end

local function failure(state, b, at)
    if state == START then
        return nil, format("not a JSON object: it does not begin with { (byte %d)", at)
    end
    return nil, format("not JSON: %s at byte %d", reason(state, b), at)
end

-- The bytes from `begin` (counted from the body's first) to `to` in this piece, as far as `limit`.
local function captured(self, p, to)
    local from = self.begin - self.offset
    self.capturing = false
    if from >= 0 then
        return text_at(p + from, min(to - from, self.limit))
    end
    local kept = self.kept
    return kept .. text_at(p, min(to, self.limit - #kept))
end

-- The piece ends within a capture.
local function keep(self, p, n)
    local kept = self.begin >= self.offset and "" or self.kept
    local from = self.begin >= self.offset and self.begin - self.offset or 0
    self.kept = kept .. text_at(p + from, min(n - from, self.limit - #kept))
end

local function end_key(self, p, to)
    local length = self.offset + to - self.begin
    self.interest = nil
    if length < 5 or length > MAX_KEY then
        self.capturing = false
        return
    end
    local raw = captured(self, p, to)
    local interest = INTEREST[raw]
    if not interest and find(raw, "\\", 1, true) then
        interest = INTEREST[unescape(raw) or ""]
    end
    self.interest = interest
end

-- A value of interest begins at `at` of this piece.
local function begin_value(self, first, at)
    local interest, begin = self.interest, self.offset + at
    if interest == MODEL then
        self.model = nil
        if self.model_seen then
            self.model_problem = '"model" is given twice'
            self.interest = nil
            return
        end
        self.model_seen = true
        if first ~= QUOTE then
            self.model_problem = '"model" must be a string, got '
                .. (KINDS[char(first)] or "a number")
            self.interest = nil
            return
        end
        self.from = begin
        self.begin, self.limit, self.capturing = begin + 1, MAX_MODEL + 1, true
    elseif interest == STREAM then
        self.stream = first == 0x74
        self.interest = nil
    elseif interest <= self.place_of then
        self.begin, self.limit, self.capturing = begin, PLACE_BYTES, true
    else
        self.interest = nil
    end
end

-- A value of interest ends before `to` of this piece.
local function end_value(self, p, to)
    local interest = self.interest
    self.interest = nil
    if not interest then
        return
    elseif interest ~= MODEL then
        self.place_of = interest
        self.place = crc32(captured(self, p, to))
        return
    end
    local raw = captured(self, p, to - 1)
    self.to = self.offset + to
    if #raw > MAX_MODEL then
        self.model_problem = format('"model" is longer than %d bytes', MAX_MODEL)
        return
    end
    if find(raw, "\\", 1, true) then
        raw = unescape(raw)
    end
    self.model = raw
    if not raw then
        self.model_problem = '"model" has half a surrogate pair'
    end
end

-- How many bytes of a word come before its first marked one.
local function before_mark(marks)
    return tonumber(rshift(band(marks - 1ULL, bnot(marks), ONES) * ONES, 56)) - 1
end

-- Marks bytes that need a look: quotes, backslashes, control characters, anything but ASCII. Bytes
-- behind the first marked one may be marked wrongly.
local function marks_at(p, i)
    local w = cast("const uint64_t *", p + i)[0]
    return band(HIGH_BITS,
        bor(w, w - SPACES, bxor(w, QUOTES) - ONES, bxor(w, BACKSLASHES) - ONES))
end

local function skip_long(p, i, n)
    while i + WORD <= n do
        local marks = marks_at(p, i)
        if marks ~= 0ULL then
            return i + before_mark(marks)
        end
        i = i + WORD
    end
    return i
end

-- The place of the next byte from `i` on, in a string, that needs a look; or one before it, near
-- the end. Most strings are short, and a loop would cost a change of traces.
local function skip(p, i, n)
    if i + 2 * WORD > n then
        return i
    end
    local marks = marks_at(p, i)
    if marks ~= 0ULL then
        return i + before_mark(marks)
    end
    marks = marks_at(p, i + WORD)
    if marks ~= 0ULL then
        return i + WORD + before_mark(marks)
    end
    return skip_long(p, i + 2 * WORD, n)
end

-- A short cut: a key has begun before `i`; reads on as long as it looks like "key": "text".
local function pair(p, i, n)
    i = skip(p, i, n)
    if i >= n or p[i] ~= QUOTE then
        return i, key_object
    end
    i = i + 1
    if i >= n or p[i] ~= COLON then
        return i, colon_object
    end
    i = i + 1
    if i < n and p[i] == BLANK then
        i = i + 1
    end
    if i >= n or p[i] ~= QUOTE then
        return i, object_value
    end
    i = skip(p, i + 1, n)
    if i >= n or p[i] ~= QUOTE then
        return i, text_object
    end
    return i + 1, after_object
end

-- Two of them: what messages are made of.
local function pairs_of_strings(p, i, n)
    local state
    i, state = pair(p, i, n)
    if state ~= after_object or i >= n or p[i] ~= COMMA then
        return i, state
    end
    i = i + 1
    if i < n and p[i] == BLANK then
        i = i + 1
    end
    if i >= n or p[i] ~= QUOTE then
        return i, next_key
    end
    return pair(p, i + 1, n)
end

-- A short cut: an object in a list has ended before `i`; what follows, if it looks like the next
-- one. Whether that began is the third value.
local function next_object(p, i, n)
    if i >= n or p[i] ~= COMMA then
        return i, after_list, false
    end
    i = i + 1
    if i < n and p[i] == BLANK then
        i = i + 1
    end
    if i >= n or p[i] ~= OPENING_BRACE then
        return i, list_value, false
    end
    return i + 1, begin_object, true
end

-- An object or list begins at `at` of this piece, below `depth` others; its first state.
local function open(self, first, at, depth)
    if depth == 0 then
        return begin_top
    elseif depth == 1 and self.interest then
        begin_value(self, first, at)
    elseif depth == FEW_LEVELS then
        local levels = all_levels()
        ffi.copy(levels, self.levels, ffi.sizeof(few_levels))
        self.levels = levels
    end
    if first == OPENING_BRACE then
        self.levels[depth + 1] = after_object
        return begin_object
    end
    self.levels[depth + 1] = after_list
    return begin_list
end

-- One ends before `i`, and `depth` are left.
local function close(self, p, i, n, depth)
    if depth > 1 then
        local state = self.levels[depth]
        if state == after_list and p[i - 1] == CLOSING_BRACE then
            local again
            i, state, again = next_object(p, i, n)
            depth = again and depth + 1 or depth
        end
        return i, state, depth
    elseif depth == 1 then
        end_value(self, p, i)
        return i, after_top, depth
    end
    return i, END, depth
end

-- What happens on the top level only; `i` is behind the byte that made it happen.
local function at_top(self, p, i, move)
    local first = p[i - 1]
    if move == TOP_KEY then
        self.begin, self.limit, self.capturing = self.offset + i, MAX_KEY, true
        return key_top
    elseif move == KEY_END then
        end_key(self, p, i - 1)
        return colon_top
    elseif move == TEXT_END then
        end_value(self, p, i)
        return after_top
    end
    if self.interest then
        begin_value(self, first, i - 1)
    end
    if move == TOP_TEXT then
        return text_top
    end
    self.interest, self.capturing = nil, false
    return scalar_top[first]
end

--- Read the next `n` bytes at `p` (a pointer to uint8_t). True, or nil and what is wrong. Never
--- yields.
function _M.feed(self, p, n)
    local state, depth = self.state, self.depth
    local i = 0
    if between_characters(state) then
        state = state + ROW
    end
    while i < n do
        local move
        repeat -- in a loop of its own it is one trace, whatever the body looks like
            move = moves[state + p[i]]
            i = i + 1
            if move >= ACTIONS then
                break
            end
            state = move
        until i >= n
        if move < ACTIONS then
            break
        elseif move == KEY then
            i, state = pairs_of_strings(p, i, n)
        elseif move == CLOSE then
            i, state, depth = close(self, p, i, n, depth - 1)
        elseif move == OPEN then
            if depth == MAX_DEPTH then
                return nil, format("not accepted: more than %d levels (byte %d)",
                    MAX_DEPTH, self.offset + i)
            end
            state = open(self, p[i - 1], i - 1, depth)
            depth = depth + 1
        elseif move == RESUME then
            state = state - ROW
            i = skip(p, i, n)
        elseif move == TEXT or move == ITEM then
            state = move == TEXT and text_object or text_list
            i = skip(p, i, n)
        elseif move == FAIL then
            return failure(state, p[i - 1], self.offset + i)
        else
            state = at_top(self, p, i, move)
            i = move == TOP_TEXT and skip(p, i, n) or i
        end
    end
    if self.capturing then
        keep(self, p, n)
    end
    self.state, self.depth, self.offset = state, depth, self.offset + n
    return true
end

--- All was fed. True, or nil and what is wrong.
function _M.finish(self)
    if self.state == START then
        return nil, "the body is empty"
    elseif self.state ~= END then
        return nil, format("not JSON: it ends too early, after byte %d", self.offset)
    end
    if not self.model_seen then
        self.model_problem = '"model" is missing'
    end
    return true
end

return _M
