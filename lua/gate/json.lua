-- JSON as people read it. Pure: loads without nginx, has no state.

local cjson = require "cjson.safe"

local _M = {}

--- The text of a value. The encoder puts a backslash before each slash, which JSON allows and
--- people stumble over.
function _M.encode(value)
    return (cjson.encode(value):gsub("\\/", "/"))
end

return _M
