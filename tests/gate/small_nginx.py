"""An nginx with one worker and the gate's modules, for looks at a single one of them."""

from __future__ import annotations

import getpass
import grp
import os
import signal
import subprocess
from http.client import HTTPConnection
from pathlib import Path

from slurmgate import nginx, share
from tests.gate.harness import wait_until

CONFIG = """
include /etc/nginx/modules-enabled/*.conf;
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
{user}
events {{ }}
http {{
    lua_package_path "{lua}/?.lua;;";
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {http}
}}
"""


class SmallNginx:
    """Runs until ``stop``; ``http`` is what stands in its http section and listens on ``port``."""

    def __init__(self, folder: Path, port: int, http: str) -> None:
        self.folder = folder
        self.port = port
        user = ""
        if os.geteuid() == 0:
            user = f"user {getpass.getuser()} {grp.getgrgid(os.getegid()).gr_name};"
        conf = folder / "nginx.conf"
        conf.write_text(CONFIG.format(folder=folder, lua=share.lua_dir(), user=user, http=http))
        self._process = subprocess.Popen(
            [nginx.find_nginx(), "-e", "stderr", "-c", str(conf)], start_new_session=True
        )
        self.connection = HTTPConnection("127.0.0.1", port, timeout=30)
        wait_until(self._listens, "nginx listens")

    def _listens(self) -> bool:
        assert self._process.poll() is None, "nginx ended"
        try:
            self.connection.connect()
        except ConnectionRefusedError:
            return False
        return True

    def stop(self) -> None:
        self.connection.close()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
