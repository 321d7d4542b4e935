-- Clients' keys: who sent a request, and whether he may. A key is known by its SHA-256 alone; what
-- was sent is hashed, a candidate found by the beginning of the digest, and the whole digest
-- compared in the same time whatever it is. No key is kept, logged or answered.
--
-- Per worker: the compiled list of keys, made anew with each version; the last digest made. Shared
-- (through the store): the list as it came from the backend, and the counts of limits.lua.
--
-- nginx variables: sg_user (the key's name, also of a refused request), sg_key (1 while counted in
-- flight on it), sg_token (what the service gets: "" the client's own headers, - none, else that).

local bit = require "bit"
local cjson = require "cjson.safe"
local ffi = require "ffi"

local limits = require "gate.limits"
local store = require "gate.store"

local C = ffi.C
local clear_header = ngx.req.clear_header
local time = ngx.time
local bor = bit.bor
local bxor = bit.bxor
local byte = string.byte
local find = string.find
local ipairs = ipairs
local lower = string.lower
local sub = string.sub
local tonumber = tonumber

local BLANK = 32
local TOKEN_LENGTH = 46
local LOOKS = 16        -- at what may be a key within a header
local NOT_FOR_IT = "This key is not for this service."
local TOKEN_LIMIT = 256 -- longer ones are nobody's, and not worth hashing

ffi.cdef [[
typedef union { uint8_t bytes[32]; uint32_t words[8]; } sg_digest_t;
typedef struct { uint64_t fields[32]; } sg_sha256_t; // larger than OpenSSL's
int SHA256_Init(sg_sha256_t *hash);
int SHA256_Update(sg_sha256_t *hash, const void *data, size_t length);
int SHA256_Final(unsigned char *digest, sg_sha256_t *hash);
]]

local digest = ffi.new("sg_digest_t")
local hash = ffi.new("sg_sha256_t")

local version          -- of the compiled list, nil before the first
local required = false
local entries = {}
local by_word = {}     -- first word of the digest → entry
local by_name = {}

local _M = {}

-- The list -----------------------------------------------------------------------------------

local function value(field)
    if field == cjson.null then
        return nil
    end
    return field
end

local function set_of(names)
    local set = {}
    for _, name in ipairs(names) do
        set[name] = true
    end
    return set
end

local function compile_digest(hex)
    local made = ffi.new("sg_digest_t")
    for i = 0, 31 do
        made.bytes[i] = tonumber(sub(hex, 2 * i + 1, 2 * i + 2), 16)
    end
    return made
end

local function compile_entry(told)
    local services = value(told.services)
    local entry = {
        name = told.name, digest = compile_digest(told.sha256),
        services = services and set_of(services), -- nil: all
        rpm = value(told.rpm) or 0, in_flight = value(told.in_flight) or 0,
        expires = value(told.expires),
    }
    limits.prepare(entry)
    return entry
end

-- Whatever goes wrong on the way leaves the list before in force, whole.
local function compile(new_version, told)
    local list, words, names = {}, {}, {}
    for i, one in ipairs(told.entries) do
        local entry = compile_entry(one)
        local word = entry.digest.words[0]
        entry.twin = words[word] -- one of the same first word, once in a blue moon
        words[word] = entry
        names[entry.name] = entry
        list[i] = entry
    end
    required, entries, by_word, by_name = told.required == true, list, words, names
    version = new_version
end

--- Take over the newest list; the tick, and whoever takes over a snapshot, before that.
function _M.refresh()
    local stored = store.keys_version()
    if stored == version then
        return
    end
    local text, of = store.keys()
    local told, err = cjson.decode(text or "")
    if not told then
        ngx.log(ngx.CRIT, "keys ", stored, ": ", err, "; nobody has access")
        told = { required = true, entries = {} }
    end
    compile(of or stored, told)
end

--- Version of this list, nil before the first.
function _M.version()
    return version
end

--- Store a list that the backend sent to whoever had the version `basis`: true, or nil and why not.
function _M.put(basis, told)
    local ok, err = store.put_keys(basis, told.version, cjson.encode(told))
    _M.refresh()
    return ok, err
end

--- Whether services that are not public need a key.
function _M.required()
    if not version then
        _M.refresh()
    end
    return required
end

-- Who sent it --------------------------------------------------------------------------------

-- All of it, whatever differs. No loop here and in `look_up`: each would cut the trace of the JIT
-- compiler in which a request with a key just fits.
local function same(one)
    local a, b = one.words, digest.words
    return bor(bxor(a[0], b[0]), bxor(a[1], b[1]), bxor(a[2], b[2]), bxor(a[3], b[3]),
        bxor(a[4], b[4]), bxor(a[5], b[5]), bxor(a[6], b[6]), bxor(a[7], b[7])) == 0
end

local function among_twins(entry)
    repeat
        entry = entry.twin
    until not entry or same(entry.digest)
    return entry
end

local function look_up(token)
    C.SHA256_Init(hash)
    C.SHA256_Update(hash, token, #token)
    C.SHA256_Final(digest.bytes, hash)
    local entry = by_word[digest.words[0]]
    if not entry or same(entry.digest) then
        return entry
    end
    return among_twins(entry)
end

-- The token of "Bearer TOKEN"
local function bearer(header)
    if not header or lower(sub(header, 1, 7)) ~= "bearer " then
        return nil
    end
    local from = 8
    while byte(header, from) == BLANK do
        from = from + 1
    end
    return sub(header, from)
end

-- The key that was sent, nil without any; false if two were, and not the same.
local function sent(var)
    local token, other = bearer(var.http_authorization), var.http_x_api_key
    if other == "" then
        other = nil
    end
    if token and other and token ~= other then
        return false
    end
    return token or other
end

local function expired(entry)
    return entry.expires ~= nil and time() >= entry.expires
end

-- The entry of the key that was sent, whether or not it expired; nil without any, false if wrong.
local function who(var)
    local token = sent(var)
    if not token then
        return token
    end
    return #token <= TOKEN_LIMIT and look_up(token) or false
end

--- Whose key a request has: its entry, nil without one, false if it is none of ours or expired.
function _M.identify(var)
    local entry = who(var)
    if entry and expired(entry) then
        return false
    end
    return entry
end

--- Whether the owner of a key may use a service.
function _M.may(entry, service)
    return entry.services == nil or entry.services[service.name] == true
end

-- Public services ----------------------------------------------------------------------------

-- Whether a key of ours stands anywhere in a header, and its entry. A header with very many that
-- may be some is as good as one that has one.
local function contained(header)
    local at = header and find(header, "sg-", 1, true)
    for _ = 1, LOOKS do
        local entry = at and look_up(sub(header, at, at + TOKEN_LENGTH - 1))
        if not at or entry then
            return entry ~= nil, entry
        end
        at = find(header, "sg-", at + 1, true)
    end
    return at ~= nil, nil
end

-- They get what the client sent, but no key of ours: whoever serves them could use it.
local function open(var)
    local in_bearer, of_bearer = contained(var.http_authorization)
    local in_other, of_other = contained(var.http_x_api_key)
    if in_bearer then
        clear_header("Authorization")
    end
    if in_other then
        clear_header("X-Api-Key")
    end
    local entry = of_bearer or of_other
    if entry and not expired(entry) then
        var.sg_user = entry.name
        limits.note(entry)
    end
    return true
end

-- What a request may -------------------------------------------------------------------------

local function refuse(entry, code, service, detail)
    if entry then
        limits.refused(entry)
    end
    return nil, code, { service = service.name, detail = detail }
end

--- Whether the sender of a request may use a service just now, and count the request on his key:
--- true, or nil with a code and facts. To be asked once, before anything is started or counted.
--- `known` is the entry of his key if `identify` has given it for this request.
function _M.authorise(var, service, known)
    if service.public then
        return open(var)
    end
    local entry = known or who(var)
    if not entry then
        return refuse(nil, "unauthorized", service)
    end
    var.sg_user = entry.name
    if expired(entry) then
        return refuse(entry, "unauthorized", service, "This key has expired.")
    elseif not _M.may(entry, service) then
        return refuse(entry, "forbidden", service, NOT_FOR_IT)
    end
    local ok, code, facts = limits.take(entry)
    if not ok then
        facts.service = service.name
        return nil, code, facts
    end
    var.sg_key = "1"
    var.sg_token = "-"
    return true
end

--- Whether the key of a held request is still good: true, or nil and a code. `service` is what it
--- is held for, nil while nobody knows.
function _M.still(var, service)
    local user = var.sg_user
    if not required or (service and service.public) then
        return true
    elseif user == "" then
        -- It came when no key was needed. While nobody knows its service nothing starts for it.
        if service then
            return _M.authorise(var, service)
        end
        return true
    end
    local entry = who(var)
    if entry == nil and var.sg_relayed == "1" then
        entry = by_name[user] -- the outer request has the header
    end
    if not entry or expired(entry) then
        return nil, "unauthorized"
    elseif service and not _M.may(entry, service) then
        return nil, "forbidden", { detail = NOT_FOR_IT }
    end
    return true
end

--- A request has ended, or is about to be answered by the gate itself: it no longer counts on its
--- key.
function _M.release(var)
    if limits.held() > 0 and var.sg_key == "1" then
        var.sg_key = ""
        limits.give_back(var.sg_user)
    end
end

-- What a replica wants to be shown -----------------------------------------------------------

--- The service gets a replica's own key with this try.
function _M.lend(var, key)
    var.sg_token = key
end

--- That try is over; the next replica may have another key, or none.
function _M.take_back(var)
    var.sg_token = var.sg_user ~= "" and "-" or ""
end

--- What there is to tell about the use of keys, by name.
function _M.report(tags)
    local use = {}
    for i = 1, #entries do
        use[entries[i].name] = limits.report(tags, entries[i])
    end
    return use
end

return _M
