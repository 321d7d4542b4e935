-- JSON's grammar as a table: for each state and byte the next state, or what to do. The states of a
-- string hold it to UTF-8. No state of its own: the table never changes.

local ffi = require "ffi"

local byte, char, find, sub = string.byte, string.char, string.find, string.sub

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
local FIRST_ESCAPE, FIRST_UTF8 = 2 * ROW, 7 * ROW
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

local _M = {
    ROW = ROW, ACTIONS = ACTIONS, moves = moves,
    FAIL = FAIL, OPEN = OPEN, CLOSE = CLOSE, RESUME = RESUME,
    KEY_END = KEY_END, TEXT_END = TEXT_END, SCALAR = SCALAR,
    TOP_KEY = TOP_KEY, TOP_TEXT = TOP_TEXT, KEY = KEY, TEXT = TEXT, ITEM = ITEM,
    START = START, END = END,
    -- Inside of strings
    key_top = key_top, text_top = text_top,
    key_object = key_object, text_object = text_object, text_list = text_list,
    -- At the beginning of objects and lists, and behind what is in them
    begin_top = begin_top, begin_object = begin_object, begin_list = begin_list,
    after_top = after_top, after_object = after_object, after_list = after_list,
    colon_top = colon_top, colon_object = colon_object,
    next_key = next_key, object_value = object_value, list_value = list_value,
    scalar_top = scalar_top,
}

--- Whether a state is one where skipping may begin: in a string, and between two characters.
function _M.between_characters(state)
    return state < texts and state % STRING_ROWS == 0
end

--- What is wrong with a byte that fails in a state.
function _M.reason(state, b)
    if state < texts then
        local part = state % STRING_ROWS
        if part >= FIRST_ESCAPE and part < FIRST_UTF8 then
            return "bad escape in a string"
        elseif part >= FIRST_UTF8 or b >= 0x80 then
            return "not UTF-8"
        end
        return "control character in a string"
    elseif state == END then
        return "more after the object"
    end
    return "unexpected character"
end

return _M
