"""A service that starts fast: service.py PORT, with Python's own library only.

``BENCH_LOAD_S`` seconds after its start (default 0) its health path turns 200. Any other request is
answered with moments on the machine's monotonic clock: when it became healthy, and when this
request came. One connection after the other: the benchmarks send it one request per start. It
listens on ``BENCH_HOST`` (127.0.0.1).
"""

import json
import os
import socket
import sys
import time

started = time.monotonic()
healthy = started + float(os.environ.get("BENCH_LOAD_S", "0"))

listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind((os.environ.get("BENCH_HOST", "127.0.0.1"), int(sys.argv[1])))
listener.listen(1024)
while True:
    client, _ = listener.accept()
    client.settimeout(5)
    try:
        request = b""
        while b"\r\n\r\n" not in request and (chunk := client.recv(65536)):
            request += chunk
        now = time.monotonic()
        status, body = "200 OK", json.dumps({"healthy": healthy, "came": now})
        if request.startswith(b"GET /health ") and now < healthy:
            status, body = "503 Service Unavailable", "loading"
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        client.sendall((head + body).encode())
    except OSError as error:
        sys.stderr.write(f"{error}\n")
    finally:
        client.close()
