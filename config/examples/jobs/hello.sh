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
import http.server
import platform
import sys


class Hello(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        text = f"hello from {platform.node()}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Hello).serve_forever()
PYTHON
