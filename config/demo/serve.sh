#!/bin/sh
# Starts the demo model server: serve.sh PORT
# With the project's own Python when there is one, since that has aiohttp.
here=$(cd "$(dirname "$0")" && pwd -P)
python=$here/../../.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" "$here/model_server.py" "$1"
