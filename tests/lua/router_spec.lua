local router = require "gate.router"

local function table_of(...)
    local routes = {}
    for _, service in ipairs { ... } do
        service.api_prefixes = router.prefixes(service.api_paths or { "/" })
        service.no_wake = router.prefixes(service.no_wake or {})
        routes[service.route] = service
    end
    return routes
end

describe("a path is passed on", function()
    for _, path in ipairs {
        "/", "/llm", "/llm/v1/x", "/llm/a.b/..c", "/llm/%20%41", "/llm//x/", "/llm/.../x",
        "/llm/%252f", "/llm/...;x", "/llm/a;..",
    } do
        it("when it is " .. path, function()
            assert.is_true(router.safe(path))
        end)
    end
end)

describe("a path is refused", function()
    for _, path in ipairs {
        "", "llm", "*", "/llm/..", "/llm/../x", "/./x", "/llm/.", "/llm/%2e%2E/x", "/llm/.%2e",
        "/llm/%2e", "/llm%2fx", "/llm%5Cx", "/llm\\x", "/llm/%00", "/llm/%0a", "/llm/%7f",
        "/llm/\1", "/llm/%zz", "/llm/%", "/llm/..;/x", "/llm/.;a=1", "/llm/%2E%2e%3b/x",
    } do
        it("when it is " .. path:gsub("%c", "?"), function()
            assert.is_false(router.safe(path))
        end)
    end
end)

describe("match", function()
    local routes = table_of(
        { route = "llm" },
        { route = "api", api_paths = { "/v1", "/x/" }, no_wake = { "/v1/status" } }
    )

    it("finds the service and what it is asked", function()
        local target = router.match(routes, "/llm/v1/x%20y")
        assert.are.equal("service", target.kind)
        assert.are.equal(routes.llm, target.service)
        assert.are.equal("/v1/x%20y", target.path)
        assert.is_false(target.passive)
    end)

    it("asks for / when only the route was given", function()
        assert.are.equal("/", router.match(routes, "/llm").path)
        assert.are.equal("/", router.match(routes, "/llm/").path)
    end)

    it("allows prefixes at segment boundaries only", function()
        assert.are.equal("service", router.match(routes, "/api/v1").kind)
        assert.are.equal("service", router.match(routes, "/api/v1/y").kind)
        assert.are.equal("service", router.match(routes, "/api/x/y").kind)
        assert.are.equal("path-not-allowed", router.match(routes, "/api/v1x").kind)
        assert.are.equal("path-not-allowed", router.match(routes, "/api").kind)
    end)

    it("knows paths that wake nobody", function()
        assert.is_true(router.match(routes, "/api/v1/status/now").passive)
        assert.is_false(router.match(routes, "/api/v1/statusx").passive)
    end)

    it("knows the gate's own pages", function()
        local kinds = {
            ["/"] = "page", ["/info"] = "page", ["/info/LLM"] = "page", ["/check_llm"] = "page",
            ["/metrics"] = "metrics", ["/healthz"] = "healthz", ["/readyz"] = "readyz",
            ["/v1/models"] = "models", ["/v1/models/a%2Fb"] = "models", ["/v1/chat"] = "api",
            ["/admin/reload"] = "admin", ["/demand_llm"] = "admin",
            ["/enable_service_management"] = "admin",
        }
        for path, kind in pairs(kinds) do
            assert.are.equal(kind, router.match(routes, path).kind)
        end
    end)

    it("knows them under no other name", function()
        for _, path in ipairs {
            "//", "//llm/x", "//info", "/info/", "/healthz/", "/readyz/x", "/metrics/x", "/check_",
            "/check_/llm", "/check_llm/", "/demand_", "/enable_service_management/x",
        } do
            assert.are.equal("no-such-route", router.match(routes, path).kind)
        end
    end)

    it("refuses unknown routes and unsafe paths", function()
        assert.are.equal("no-such-route", router.match(routes, "/other/x").kind)
        assert.are.equal("no-such-route", router.match(routes, "/LLM/x").kind)
        assert.are.equal("bad-path", router.match(routes, "/llm/../info").kind)
    end)
end)

describe("a path for the log", function()
    it("is itself when it is printable", function()
        assert.is_nil(router.printable("/llm/a%20b;c?d~"))
    end)

    it("has other bytes encoded", function()
        assert.are.equal("/%C3%A9%20%0A%7F", router.printable("/\195\169 \n\127"))
    end)
end)
