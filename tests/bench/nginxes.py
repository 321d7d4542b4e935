"""The other nginxes of a comparison: a service that costs next to nothing, and a plain proxy."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from slurmgate.nginx import find_nginx
from tests.up.product import Product, children
from tests.waiting import until

NO_OTHERS: Mapping[str, str] = MappingProxyType({})

# A user of nginx who compares would have both: the same kind of log, and kept connections.
PLAIN = """
    log_format plain escape=json
        '{"time":"$time_iso8601","client":"$remote_addr","method":"$request_method",'
        '"path":"$uri","status":$status,"seconds":$request_time,'
        '"upstream_seconds":"$upstream_response_time",'
        '"bytes_in":$request_length,"bytes_out":$bytes_sent}';
    access_log "%(folder)s/plain-access.log" plain buffer=64k flush=1s;
    keepalive_requests 10000;
    client_max_body_size 1g;
    %(upstreams)s
    server {
        listen 127.0.0.1:%(port)s backlog=8192;
        proxy_http_version 1.1;
        proxy_set_header Host $http_host;
        proxy_set_header Connection "";
        proxy_set_header X-Forwarded-For $remote_addr;
        %(locations)s
    }
"""

UPSTREAM = """
    upstream %(name)s {
        server %(server)s;
        keepalive 256;
        keepalive_requests 100000;
    }
"""

SERVICE = """
    access_log off;
    keepalive_requests 10000000;
    server {
        listen %(host)s:%(port)s backlog=8192;
        default_type application/json;
        location = /health {
            if (!-f "%(folder)s/healthy") { return 503; }
            return 200;
        }
        location = /large { root "%(folder)s"; sendfile on; }
        location / { return 200 '{"answer": "A small answer, of the size a quick call has."}\\n'; }
    }
"""

FRAME = """
daemon off;
worker_processes 1;
worker_rlimit_nofile 20000;
%(user)s
pid "%(folder)s/%(name)s.pid";
error_log stderr warn;
events { worker_connections 8192; }
http {
    client_body_temp_path "%(folder)s/temp-%(name)s";
    proxy_temp_path "%(folder)s/temp-%(name)s";
    fastcgi_temp_path "%(folder)s/temp-%(name)s";
    uwsgi_temp_path "%(folder)s/temp-%(name)s";
    scgi_temp_path "%(folder)s/temp-%(name)s";
    %(body)s
}
"""


def _configuration(folder: Path, name: str, body: str, **values: object) -> str:
    text = body % {"folder": folder, **values}
    user = "user root;" if os.geteuid() == 0 else ""
    return FRAME % {"folder": folder, "name": name, "user": user, "body": text}


def fast_service(product: Product, name: str, **fields: object) -> None:
    """Configure a service that is an nginx; it is healthy once ``say_healthy`` was called.

    Each start adds a line to the file ``starts`` beside it.
    """
    script = product.script("fast.sh", fast_script(product.folder, "127.0.0.1"))
    product.service(name, script, **fields)


def fast_script(folder: Path, host: str) -> str:
    """The script of ``fast_service``.

    ``host`` is what it listens on, or shell text for it; ``/large`` is the file ``large`` in the
    folder.
    """
    pattern = folder / "service.conf.in"
    pattern.write_text(
        _configuration(folder, "service-@PORT@", SERVICE, host="@HOST@", port="@PORT@")
    )
    made = f"{folder}/service-$1.conf"
    return (
        f'echo started >>"{folder}/starts"\n'
        f'sed "s/@HOST@/{host}/g; s/@PORT@/$1/g" "{pattern}" >"{made}"\n'
        f'exec "{find_nginx()}" -e stderr -c "{made}"'
    )


def say_healthy(product: Product) -> None:
    (product.folder / "healthy").touch()


def starts(product: Product) -> int:
    return len((product.folder / "starts").read_text().splitlines())


@dataclass(frozen=True, slots=True)
class Plain:
    """A running plain proxy."""

    port: int
    workers: list[int]


@contextlib.contextmanager
def plain_proxy(
    folder: Path, port: int, upstream: str, others: Mapping[str, str] = NO_OTHERS
) -> Iterator[Plain]:
    """Run nginx with nothing but ``proxy_pass``, kept connections and an access log.

    ``upstream`` is what nginx calls a server: ``host:port`` or ``unix:/path``. ``others`` are those
    of other paths' beginnings.
    """
    conf = folder / "plain.conf"
    upstreams, locations = "", ""
    for index, (path, server) in enumerate({"/": upstream, **others}.items()):
        upstreams += UPSTREAM % {"name": f"service-{index}", "server": server}
        locations += f"location {path} {{ proxy_pass http://service-{index}; }}\n"
    parts = {"upstreams": upstreams, "locations": locations}
    conf.write_text(_configuration(folder, "plain", PLAIN, port=port, **parts))
    process = subprocess.Popen([find_nginx(), "-e", "stderr", "-c", str(conf)])
    try:
        until(lambda: _listens(port))
        yield Plain(port, until(lambda: children(process.pid)))
    finally:
        process.terminate()
        process.wait(20)


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
