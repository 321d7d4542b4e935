"""The test service: tells which job and which node answered. Python's own library only."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers every path; what was sent comes back as ``body``."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is sent at once: none is half sent when a tunnel is killed

    def do_GET(self) -> None:
        self._answer("")

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self._answer(self.rfile.read(length).decode())

    def _answer(self, body: str) -> None:
        job = os.environ["SLURM_JOB_ID"]
        told = {"job": job, "node": socket.gethostname(), "path": self.path, "body": body}
        content = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    time.sleep(float(os.environ.get("LOAD_S", "0")))  # nothing listens while a model is loaded
    ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
