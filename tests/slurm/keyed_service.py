"""A service for tests that answers nobody who does not show the key it was given.

keyed_service.py HOST PORT
"""

from __future__ import annotations

import http.server
import json
import os
import sys

KEY = os.environ["SLURMGATE_API_KEY"]


class Keyed(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        shown = self.headers.get_all("Authorization", [])
        asked = {"pid": os.getpid(), "x_api_key": self.headers.get("X-Api-Key")}
        body = json.dumps(asked).encode()
        self.send_response(200 if shown == [f"Bearer {KEY}"] else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the tests look for the key in what is logged, not for requests."""


http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Keyed).serve_forever()
