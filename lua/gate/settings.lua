-- What the rendered nginx configuration passes to the Lua code. Written once, in init_by_lua of the
-- master; read-only afterwards, so every worker sees the same values.

local _M = {
    control_socket = nil, -- unix socket of the backend that answers notify calls
    inner_socket = nil,   -- unix socket on which the gate asks itself
    api_socket = nil,     -- unix socket of the backend for info, metrics and admin calls
    max_body = nil,       -- bytes; also what is reserved for a body of unknown length
    max_held_bytes = nil, -- bytes all waiting requests' bodies may take together
    admin_max_body = nil, -- bytes an admin call may send
    cors = {},            -- origins whose pages may read answers, unless a service says otherwise
}

--- Take over the values of the configuration.
function _M.load(values)
    for name, value in pairs(values) do
        _M[name] = value
    end
end

return _M
