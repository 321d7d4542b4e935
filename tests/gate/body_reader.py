"""An nginx of its own that tells what the gate's modules find in bodies."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

from tests.gate.small_nginx import SmallNginx
from tests.ports import free_port

CONFIG = """
    lua_check_client_abort on;
    keepalive_requests 1000000;
    client_max_body_size 0;
    init_by_lua_block {{
        local cjson = require "cjson.safe"
        local ffi = require "ffi"
        local multipart = require "gate.multipart"
        local payload = require "gate.payload"
        local scanner = require "gate.scanner"

        -- An error has a byte's place and no part of the body; it is told apart from all else.
        local function told(found, why)
            if not found then
                return {{ error = why }}
            end
            return {{
                model = found.model, model_problem = found.model_problem, stream = found.stream,
                place = found.place, from = found.from, to = found.to,
            }}
        end

        local function in_pieces(kind, reader, body, length)
            local p = ffi.cast("const uint8_t *", body)
            for at = 0, #body - 1, length do
                local ok, why = kind.feed(reader, p + at, math.min(length, #body - at))
                if not ok then
                    return told(nil, why)
                end
            end
            local ok, why = kind.finish(reader)
            return told(ok and reader, why)
        end

        local function inspected()
            local found, _, why = payload.inspect(ngx.var)
            return told(found, why), found
        end

        -- The same body at once, and in pieces of many lengths
        function inspect()
            ngx.req.read_body()
            local all = {{ (inspected()) }}
            local body = ngx.req.get_body_data() or ""
            for length in (ngx.var.arg_pieces or ""):gmatch("%d+") do
                local reader, kind, why = scanner.new(), scanner
                if multipart.is(ngx.var.content_type or "") then
                    kind = multipart
                    reader, why = multipart.new(ngx.var.content_type)
                end
                all[#all + 1] = reader and in_pieces(kind, reader, body, tonumber(length))
                    or told(nil, why)
            end
            ngx.print(cjson.encode(all))
        end

        function rename()
            ngx.req.read_body()
            local _, found = inspected()
            payload.rename(found, ngx.unescape_uri(ngx.var.arg_to))
            return ngx.exec("@hold")
        end
    }}
    server {{
        listen 127.0.0.1:{port};
        location /memory {{ client_body_buffer_size 32m; content_by_lua_block {{ inspect() }} }}
        location /file {{ client_body_in_file_only clean; content_by_lua_block {{ inspect() }} }}
        location /short {{ return 204; }}
        location /rename/memory {{
            client_body_buffer_size 32m;
            access_by_lua_block {{ rename() }}
        }}
        location /rename/file {{
            client_body_buffer_size 1k;
            access_by_lua_block {{ rename() }}
        }}
        # Held for a moment, then lost to a replica that is not there, then sent again
        location @hold {{
            access_by_lua_block {{ ngx.sleep(0.01) }}
            error_page 502 = @again;
            proxy_pass http://127.0.0.1:1;
        }}
        location @again {{
            access_by_lua_block {{ ngx.sleep(0.01) }}
            proxy_pass http://127.0.0.1:{echo};
        }}
    }}
    server {{
        listen 127.0.0.1:{echo};
        location / {{
            client_body_buffer_size 32m;
            content_by_lua_block {{
                ngx.req.read_body()
                ngx.header["X-Length"] = ngx.var.http_content_length
                ngx.print(ngx.req.get_body_data())
            }}
        }}
    }}
"""

EXPECTED_ERRORS = ("connect() failed (111: Connection refused)",)
PIECES = (1, 2, 3, 7, 16, 61)
JSON_TYPE = "application/json"


class BodyReader(SmallNginx):
    """A small nginx that tells what the gate's modules find in a body."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        super().__init__(folder, port, CONFIG.format(port=port, echo=free_port()))

    def post(
        self, path: str, body: bytes, kind: str = JSON_TYPE, chunked: bool = False
    ) -> http.client.HTTPResponse:
        parts = [body[:1000], body[1000:]] if chunked else body
        self.connection.request("POST", path, parts, {"Content-Type": kind}, encode_chunked=chunked)
        return self.connection.getresponse()

    def look(self, body: bytes, kind: str = JSON_TYPE, place: str = "memory") -> dict[str, Any]:
        """What is found; the same must be found in pieces of any length."""
        pieces = "" if place == "file" else ",".join(map(str, PIECES))
        answer = self.post(f"/{place}?pieces={pieces}", body, kind)
        text = answer.read()
        assert answer.status == 200, text
        found: list[dict[str, Any]] = json.loads(text)
        assert all(other == found[0] for other in found), (body, found)
        return found[0]

    def error_lines(self) -> list[str]:
        lines = (self.folder / "error.log").read_text().splitlines()
        bad = [line for line in lines if "[error]" in line or "[alert]" in line or "[crit]" in line]
        return [line for line in bad if not any(known in line for known in EXPECTED_ERRORS)]
