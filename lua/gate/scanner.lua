-- Reads a JSON object in pieces, as they come, and keeps what the gate wants to know of its top
-- level: `model`, `stream`, and the beginning of `messages`, `prompt` or `input`. Accepts exactly
-- what Python's json.loads takes for an object in UTF-8 text, but for NaN and Infinity, more than
-- 1000 levels and a byte order mark, which are refused, and very long integers, which are not.
--
-- One table tells for each state and byte the next state, or what to do: so a piece may end
-- anywhere, and all of JSON's grammar stands in the lines that fill that table. The insides of
-- strings are skipped eight bytes at a time. No state but that table; a reader is its caller's.

local bit = require "bit"
local ffi = require "ffi"

local band, bor, bxor, rshift = bit.band, bit.bor, bit.bxor, bit.rshift
local byte, char, find, sub = string.byte, string.char, string.find, string.sub
local cast, text_at = ffi.cast, ffi.string
local concat = table.concat
local crc32 = ngx.crc32_short
local format = string.format
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

local MODEL, STREAM, PLACE = 1, 2, 3
local INTEREST = {
    model = MODEL, stream = STREAM, messages = PLACE, prompt = PLACE + 1, input = PLACE + 2,
}
local KINDS = {
    ['"'] = "a string", ["{"] = "an object", ["["] = "a list", t = "true", f = "false", n = "null",
}

-- The table ----------------------------------------------------------------------------------

-- A state is a multiple of 256, the index of its row. From ACTIONS on, values are things to do.
local ROW = 256
local ACTIONS = 60000
local FAIL, OPEN_OBJECT, OPEN_LIST, CLOSE = ACTIONS, ACTIONS + 1, ACTIONS + 2, ACTIONS + 3
local RESUME, KEY_END, TEXT_END, SCALAR = ACTIONS + 4, ACTIONS + 5, ACTIONS + 6, ACTIONS + 7
local STRINGS = ACTIONS + 8 -- and on: a string begins, in a place of use 0 to 4
local TOP_KEY, TOP_TEXT = STRINGS, STRINGS + 1

local rows = 0
local moves = ffi.new("uint16_t[?]", 200 * ROW)

local function new_state()
    local state = rows * ROW
    for b = 0, 255 do
        moves[state + b] = FAIL
    end
    rows = rows + 1
    return state
end

-- `set` is a pattern's class of characters: "0-9", "tn".
local function on(state, set, move)
    for b = 0, 255 do
        if find(char(b), "^[" .. set .. "]") then
            moves[state + b] = move
        end
    end
end

local function on_range(state, first, last, move)
    for b = first, last do
        moves[state + b] = move
    end
end

-- States of the inside of a string; `over` comes after its closing quote. The first two differ in
-- that a plain byte in the second one resumes the skipping, and leads to the first.
local function add_string(over)
    local plain, resume = new_state(), new_state()
    for _, state in ipairs { plain, resume } do
        on_range(state, 0x20, 0x7f, state == plain and plain or RESUME)
        on(state, '"', over)
    end
    local escape = new_state()
    on(escape, '"\\/bfnrt', resume)
    local follows = resume
    for _ = 1, 4 do
        local hex = new_state()
        on(hex, "0-9a-fA-F", follows)
        follows = hex
    end
    on(escape, "u", follows)
    -- UTF-8: no overlong forms, no surrogates, nothing behind U+10FFFF
    local one, two, three = new_state(), new_state(), new_state()
    local e0, ed, f0, f4 = new_state(), new_state(), new_state(), new_state()
    on_range(one, 0x80, 0xbf, resume)
    on_range(two, 0x80, 0xbf, one)
    on_range(three, 0x80, 0xbf, two)
    on_range(e0, 0xa0, 0xbf, one)
    on_range(ed, 0x80, 0x9f, one)
    on_range(f0, 0x90, 0xbf, two)
    on_range(f4, 0x80, 0x8f, two)
    for _, state in ipairs { plain, resume } do
        on(state, "\\", escape)
        on_range(state, 0xc2, 0xdf, one)
        on_range(state, 0xe1, 0xef, two)
        on_range(state, 0xf1, 0xf3, three)
        moves[state + 0xe0], moves[state + 0xed] = e0, ed
        moves[state + 0xf0], moves[state + 0xf4] = f0, f4
    end
    return plain
end

local SPACE = " \t\n\r"

-- What may follow a value: `ends` does it.
local function add_scalars(ends)
    local zero, whole, dot, part = new_state(), new_state(), new_state(), new_state()
    local e, sign, power, minus = new_state(), new_state(), new_state(), new_state()
    for _, state in ipairs { zero, whole, part, power } do
        ends(state)
    end
    on(minus, "0", zero)
    on(minus, "1-9", whole)
    on(whole, "0-9", whole)
    for _, state in ipairs { zero, whole } do
        on(state, ".", dot)
    end
    on(dot, "0-9", part)
    on(part, "0-9", part)
    for _, state in ipairs { zero, whole, part } do
        on(state, "eE", e)
    end
    on(e, "+%-", sign)
    for _, state in ipairs { e, sign, power } do
        on(state, "0-9", power)
    end
    local first = { ["-"] = minus, ["0"] = zero }
    for digit = 1, 9 do
        first[tostring(digit)] = whole
    end
    return first
end

local function add_word(word, over)
    local follows = over
    for at = #word, 2, -1 do
        local state = new_state()
        on(state, sub(word, at, at), follows)
        follows = state
    end
    return follows
end

-- Strings come first, so that a glance at a state tells whether it is inside one: their rows are
-- those below `texts`.
local after_top, after_object, after_list, colon_top, colon_object
local key_top, text_top = add_string(KEY_END), add_string(TEXT_END)
local key_object, text_object, text_list = add_string(0), add_string(0), add_string(0)
local STRING_ROWS = 14 * ROW
local texts = rows * ROW

local START, END = new_state(), new_state()
after_top, after_object, after_list = new_state(), new_state(), new_state()
colon_top, colon_object = new_state(), new_state()

local function close_quote(string_state, over)
    for state = string_state, string_state + ROW, ROW do
        moves[state + byte('"')] = over
    end
end

close_quote(key_object, colon_object)
close_quote(text_object, after_object)
close_quote(text_list, after_list)

local scalar_top = {} -- first byte of a value at the top → state, 0 where no such value begins

local function add_values(state, string_use, after, ends)
    on(state, SPACE, state)
    on(state, '"', STRINGS + string_use)
    on(state, "{", OPEN_OBJECT)
    on(state, "%[", OPEN_LIST)
    local first = add_scalars(ends)
    for _, word in ipairs { "true", "false", "null" } do
        first[sub(word, 1, 1)] = add_word(word, after)
    end
    return first
end

local function add_object(after, colon, string_use, key_use)
    local begin, key, value = new_state(), new_state(), new_state()
    local function ends(state)
        on(state, SPACE, after)
        on(state, ",", key)
        on(state, "}", CLOSE)
    end
    ends(after)
    on(begin, SPACE, begin)
    on(begin, "}", CLOSE)
    on(begin, '"', STRINGS + key_use)
    on(key, SPACE, key)
    on(key, '"', STRINGS + key_use)
    on(colon, SPACE, colon)
    on(colon, ":", value)
    local first = add_values(value, string_use, after, ends)
    for letter, state in pairs(first) do
        moves[value + byte(letter)] = after == after_top and SCALAR or state
        scalar_top[byte(letter)] = after == after_top and state or scalar_top[byte(letter)]
    end
    return begin
end

local function add_list(after)
    local begin, value = new_state(), new_state()
    local function ends(state)
        on(state, SPACE, after)
        on(state, ",", value)
        on(state, "%]", CLOSE)
    end
    ends(after)
    local first = add_values(value, 4, after, ends)
    for letter, state in pairs(first) do
        moves[value + byte(letter)] = state
    end
    for b = 0, 255 do
        moves[begin + b] = moves[value + b]
    end
    on(begin, SPACE, begin)
    on(begin, "%]", CLOSE)
    return begin
end

local BEGIN_TOP = add_object(after_top, colon_top, 1, 0)
local BEGIN_OBJECT = add_object(after_object, colon_object, 3, 2)
local BEGIN_LIST = add_list(after_list)
on(START, SPACE, START)
on(START, "{", OPEN_OBJECT)
on(END, SPACE, END)

local string_of = { [0] = key_top, text_top, key_object, text_object, text_list }

-- Names and texts ----------------------------------------------------------------------------

local SHORT = { b = "\b", f = "\f", n = "\n", r = "\r", t = "\t" }

local function utf8(code)
    if code < 0x80 then
        return char(code)
    elseif code < 0x800 then
        return char(bor(0xc0, rshift(code, 6)), bor(0x80, band(code, 0x3f)))
    elseif code < 0x10000 then
        return char(bor(0xe0, rshift(code, 12)), bor(0x80, band(rshift(code, 6), 0x3f)),
            bor(0x80, band(code, 0x3f)))
    end
    return char(bor(0xf0, rshift(code, 18)), bor(0x80, band(rshift(code, 12), 0x3f)),
        bor(0x80, band(rshift(code, 6), 0x3f)), bor(0x80, band(code, 0x3f)))
end

-- The character of a \u escape at `at`, and where the text goes on; nil for half a surrogate pair.
local function escaped(raw, at)
    local code = tonumber(sub(raw, at + 2, at + 5), 16)
    if code < 0xd800 or code > 0xdfff then
        return utf8(code), at + 6
    end
    local low = code < 0xdc00 and sub(raw, at + 6, at + 7) == "\\u"
        and tonumber(sub(raw, at + 8, at + 11), 16)
    if not low or low < 0xdc00 or low > 0xdfff then
        return nil
    end
    return utf8(0x10000 + (code - 0xd800) * 0x400 + low - 0xdc00), at + 12
end

-- What the inside of a valid JSON string says; nil if it has half a surrogate pair.
local function unescape(raw)
    local parts, at = {}, 1
    while true do
        local slash = find(raw, "\\", at, true)
        parts[#parts + 1] = sub(raw, at, (slash or 0) - 1)
        if not slash then
            return concat(parts)
        end
        local letter = sub(raw, slash + 1, slash + 1)
        if letter == "u" then
            letter, at = escaped(raw, slash)
            if not letter then
                return nil
            end
        else
            letter, at = SHORT[letter] or letter, slash + 2
        end
        parts[#parts + 1] = letter
    end
end

local _M = {}

--- Whether a text is UTF-8.
function _M.is_utf8(text)
    local state = text_list
    for at = 1, #text do
        local b = byte(text, at)
        if b < 0x80 then
            if state >= text_list + 2 * ROW then
                return false
            end
        else
            state = moves[state + b]
            if state == FAIL then
                return false
            end
        end
    end
    return state < text_list + 2 * ROW
end

-- Reading ------------------------------------------------------------------------------------

--- A reader. After all was fed and `finish` said true: model (nil if there is none that can be
--- used), model_problem (why), from and to (the bytes of the model's value: from 0, the end not
--- included), stream, place (of the beginning of its prompt).
function _M.new()
    return {
        state = START, depth = 0, offset = 0, levels = nil,
        interest = nil, capturing = false, begin = 0, kept = "", limit = 0,
        model = nil, model_problem = nil, model_seen = false, from = nil, to = nil,
        stream = false, place = nil, place_of = PLACE + 3,
    }
end

local function reason(state, b)
    if state < texts then
        local part = state % STRING_ROWS
        if part >= 2 * ROW and part < 7 * ROW then
            return "bad escape in a string"
        elseif part >= 7 * ROW or b >= 0x80 then
            return "not UTF-8"
        end
        return "control character in a string"
    elseif state == END then
        return "more after the object"
    end
    return "unexpected character"
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
local function begin_value(self, interest, first, at)
    local begin = self.offset + at
    if interest == MODEL then
        self.model = nil
        if self.model_seen then
            self.model_problem = '"model" is given twice'
            self.interest = nil
            return
        end
        self.model_seen = true
        if first ~= 0x22 then
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

-- The place behind the bytes from `i` that need no look: neither quote nor backslash nor control
-- character nor anything but ASCII, eight at a time.
local function skip(p, i, n)
    while i + WORD <= n do
        local w = cast("const uint64_t *", p + i)[0]
        local special = bor(w, w - SPACES, bxor(w, QUOTES) - ONES, bxor(w, BACKSLASHES) - ONES)
        if band(special, HIGH_BITS) ~= 0ULL then
            return i
        end
        i = i + WORD
    end
    return i
end

--- Read the next `n` bytes at `p` (a pointer to uint8_t). True, or nil and what is wrong. Never
--- yields.
function _M.feed(self, p, n)
    local state, depth, levels = self.state, self.depth, self.levels
    local i = 0
    if state < texts and state % STRING_ROWS == 0 then
        state = state + ROW
    end
    while i < n do
        local move = moves[state + p[i]]
        i = i + 1
        if move < ACTIONS then
            state = move
        elseif move == RESUME then
            state = state - ROW
            i = skip(p, i, n)
        elseif move > TOP_TEXT then
            state = string_of[move - STRINGS]
            i = skip(p, i, n)
        elseif move == CLOSE then
            depth = depth - 1
            if depth > 1 then
                state = levels[depth]
            elseif depth == 1 then
                state = after_top
                end_value(self, p, i)
            else
                state = END
            end
        elseif move == OPEN_OBJECT or move == OPEN_LIST then
            if depth == 1 and self.interest then
                begin_value(self, self.interest, p[i - 1], i - 1)
            elseif depth == MAX_DEPTH then
                return nil, format("not accepted: more than %d levels", MAX_DEPTH)
            end
            depth = depth + 1
            if depth == 1 then
                state = BEGIN_TOP
            else
                if depth == 2 and not levels then
                    levels = ffi.new("uint16_t[?]", MAX_DEPTH + 1)
                    self.levels = levels
                end
                levels[depth] = move == OPEN_LIST and after_list or after_object
                state = move == OPEN_LIST and BEGIN_LIST or BEGIN_OBJECT
            end
        elseif move == TOP_KEY then
            self.begin, self.limit, self.capturing = self.offset + i, MAX_KEY, true
            state = key_top
        elseif move == KEY_END then
            end_key(self, p, i - 1)
            state = colon_top
        elseif move == TOP_TEXT then
            if self.interest then
                begin_value(self, self.interest, 0x22, i - 1)
            end
            state = text_top
            i = skip(p, i, n)
        elseif move == TEXT_END then
            end_value(self, p, i)
            state = after_top
        elseif move == SCALAR then
            local first = p[i - 1]
            if self.interest then
                begin_value(self, self.interest, first, i - 1)
                self.interest, self.capturing = nil, false
            end
            state = scalar_top[first]
        else
            return failure(state, p[i - 1], self.offset + i)
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
