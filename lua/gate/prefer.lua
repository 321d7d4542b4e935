-- The wait a client asks for in its Prefer header (RFC 7240). Pure: loads without nginx, has no
-- state.

local find = string.find
local sub = string.sub
local tonumber = tonumber

local _M = {}

-- Where the quoted string that begins at a position ends
local function end_of_string(text, at)
    repeat
        at = find(text, '["\\]', at + 1)
        local escape = at and sub(text, at, at) == "\\"
        if escape then
            at = at + 1
        end
    until not escape
    return at or #text
end

-- Items divided by commas; those within quoted strings divide nothing.
local function split(text)
    local items, from, at = {}, 1, find(text, '[",]')
    while at do
        if sub(text, at, at) == '"' then
            at = end_of_string(text, at)
        else
            items[#items + 1] = sub(text, from, at - 1)
            from = at + 1
        end
        at = find(text, '[",]', at + 1)
    end
    items[#items + 1] = sub(text, from)
    return items
end

--- Seconds of the first `wait` preference of one header line; nil if it has none that is a whole
--- number.
function _M.wait(text)
    for _, item in ipairs(split(text)) do
        local name, value = item:match("^%s*([^%s=;]+)%s*=%s*(.-)%s*$")
        if name and name:lower() == "wait" then
            -- Parameters may follow a semicolon.
            local digits = (value .. ";"):match("^(%d+)%s*;") or value:match('^"(%d+)"%s*$')
                or value:match('^"(%d+)"%s*;')
            if digits then
                return tonumber(digits)
            end
        end
    end
    return nil
end

return _M
