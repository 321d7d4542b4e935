-- What the inside of a JSON string says, and whether a text is UTF-8. No state.

local bit = require "bit"

local grammar = require "gate.grammar"

local band, bor, rshift = bit.band, bit.bor, bit.rshift
local byte, char, find, sub = string.byte, string.char, string.find, string.sub
local concat = table.concat
local tonumber = tonumber

local FAIL = grammar.FAIL
local BEGIN, CHARACTER = grammar.text_list, grammar.text_list + 2 * grammar.ROW
local moves = grammar.moves
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

local _M = {}

--- What the inside of a valid JSON string says; nil if it has half a surrogate pair.
function _M.unescape(raw)
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

--- Whether a text is UTF-8.
function _M.is_utf8(text)
    local state = BEGIN
    for at = 1, #text do
        local b = byte(text, at)
        if b < 0x80 then
            if state >= CHARACTER then
                return false
            end
        else
            state = moves[state + b]
            if state == FAIL then
                return false
            end
        end
    end
    return state < CHARACTER
end

return _M
