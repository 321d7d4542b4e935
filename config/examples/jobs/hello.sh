#!/bin/bash
# The smallest service, to try a cluster with: answers every GET with the name of its node.
# Needs python3 on the node, no GPU. Health: /
#SBATCH --ntasks=1
#SBATCH --mem=200M
#SBATCH --time=00:30:00
set -euo pipefail

# Where to listen: 0.0.0.0 for tunnel "auto" and "none", 127.0.0.1 for "node-loopback".
host=${BIND_HOST:-0.0.0.0}

exec python3 - "$host" "$1" <<'PYTHON'
import hmac
import http.server
import os
import platform
import sys

KEY = os.environ.get("SLURMGATE_API_KEY")  # there when services.json says "upstream_key": true


class Hello(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        shown = self.headers.get("Authorization", "").encode()
        known = KEY is None or hmac.compare_digest(shown, f"Bearer {KEY}".encode())
        text = f"hello from {platform.node()}\n".encode() if known else b""
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Hello).serve_forever()
PYTHON
