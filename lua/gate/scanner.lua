-- Reads a JSON object in pieces, as they come, and keeps what the gate wants to know of its top
-- level: `model`, `stream`, and the beginning of `messages`, `prompt` or `input`. Accepts exactly
-- what Python's json.loads takes for an object in UTF-8 text, but for NaN and Infinity, more than
-- 1000 levels and a byte order mark, which are refused, and very long integers, which are not.
--
-- One table tells for each state and byte the next state, or what to do: so a piece may end
-- anywhere, and all of JSON's grammar stands in the lines that fill that table. Beside it there are
-- short cuts for what bodies are full of, which may give up after any byte and leave the rest to
-- the table: the insides of strings, eight bytes at a time, and objects of strings. No state but
-- that table; a reader is its caller's.

local bit = require "bit"
local ffi = require "ffi"

local band, bnot, bor, bxor, rshift = bit.band, bit.bnot, bit.bor, bit.bxor, bit.rshift
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

local QUOTE, COMMA, COLON, BLANK = 0x22, 0x2c, 0x3a, 0x20
local OPENING_BRACE, CLOSING_BRACE = 0x7b, 0x7d

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
local FAIL, OPEN, CLOSE, RESUME = ACTIONS, ACTIONS + 1, ACTIONS + 2, ACTIONS + 3
-- On the top level: a key, a string, another value
local KEY_END, TEXT_END, SCALAR = ACTIONS + 4, ACTIONS + 5, ACTIONS + 6
-- A string begins: a key or a value of the top object, of another object, or a value of a list.
local TOP_KEY, TOP_TEXT, KEY, TEXT, ITEM =
    ACTIONS + 8, ACTIONS + 9, ACTIONS + 10, ACTIONS + 11, ACTIONS + 12

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

-- The states of numbers; `ends` adds to a state what may follow a value. Returns the first
-- characters and their states.
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

-- The states of a word, whose first character leads to the one returned.
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

local scalar_top = ffi.new("uint16_t[256]") -- first byte of such a value at the top → state

-- The states of a place where a value is expected; returns where each value that is neither string
-- nor object nor list begins: its first character → state.
local function add_values(state, text, after, ends)
    on(state, SPACE, state)
    on(state, '"', text)
    on(state, "{", OPEN)
    on(state, "%[", OPEN)
    local first = add_scalars(ends)
    for _, word in ipairs { "true", "false", "null" } do
        first[sub(word, 1, 1)] = add_word(word, after)
    end
    return first
end

local function add_object(after, colon, key_begins, text_begins)
    local begin, key, value = new_state(), new_state(), new_state()
    local function ends(state)
        on(state, SPACE, after)
        on(state, ",", key)
        on(state, "}", CLOSE)
    end
    ends(after)
    on(begin, SPACE, begin)
    on(begin, "}", CLOSE)
    on(begin, '"', key_begins)
    on(key, SPACE, key)
    on(key, '"', key_begins)
    on(colon, SPACE, colon)
    on(colon, ":", value)
    local first = add_values(value, text_begins, after, ends)
    for letter, state in pairs(first) do
        if after == after_top then
            moves[value + byte(letter)] = SCALAR
            scalar_top[byte(letter)] = state
        else
            moves[value + byte(letter)] = state
        end
    end
    return begin, key, value
end

local function add_list(after)
    local begin, value = new_state(), new_state()
    local function ends(state)
        on(state, SPACE, after)
        on(state, ",", value)
        on(state, "%]", CLOSE)
    end
    ends(after)
    local first = add_values(value, ITEM, after, ends)
    for letter, state in pairs(first) do
        moves[value + byte(letter)] = state
    end
    for b = 0, 255 do
        moves[begin + b] = moves[value + b]
    end
    on(begin, SPACE, begin)
    on(begin, "%]", CLOSE)
    return begin, value
end

local begin_top = add_object(after_top, colon_top, TOP_KEY, TOP_TEXT)
local begin_object, next_key, object_value = add_object(after_object, colon_object, KEY, TEXT)
local begin_list, list_value = add_list(after_list)
on(START, SPACE, START)
on(START, "{", OPEN)
on(END, SPACE, END)

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

-- For each level, what comes behind a value on it. Few bodies need many levels.
local FEW_LEVELS = 32
local few_levels = ffi.typeof("uint16_t[" .. FEW_LEVELS + 1 .. "]")
local all_levels = ffi.typeof("uint16_t[" .. MAX_DEPTH + 1 .. "]")

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
        state = START, depth = 0, offset = 0, levels = few_levels(),
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
    if state < texts and state % STRING_ROWS == 0 then
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
