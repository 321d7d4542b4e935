#!/bin/bash
# vLLM with its OpenAI API. Health: /health
# MODEL, MODEL_NAME, VLLM_VENV and BIND_HOST can be set in "env" of services.json.
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --mem=64G
#SBATCH --time=08:00:00
set -euo pipefail

model=${MODEL:-$HOME/models/Qwen3-8B} # a folder as Hugging Face has them, or a name to download
venv=${VLLM_VENV:-$HOME/venvs/vllm}
# Where to listen: 0.0.0.0 for tunnel "auto" and "none", 127.0.0.1 for "node-loopback".
host=${BIND_HOST:-0.0.0.0}

# vLLM calls compilers of its environment by name.
export PATH=$venv/bin:$PATH

options=(--tensor-parallel-size "${SLURM_GPUS_ON_NODE:-1}")
if [ -n "${SLURMGATE_API_KEY:-}" ]; then # "upstream_key": true; never an argument: those are seen
    export VLLM_API_KEY=$SLURMGATE_API_KEY
    # vLLM asks for its key under /v1 only, and /invocations does the same work: ask everywhere.
    modules=$HOME/.slurmgate/python
    (umask 077 && mkdir -p "$modules")
    file=$(mktemp "$modules/XXXXXXXX") # jobs may start at the same time, on one home directory
    cat >"$file" <<'PYTHON'
import hmac
import os

EXPECTED = b"Bearer " + os.environ["SLURMGATE_API_KEY"].encode()


class Keyed:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        shown = [value for name, value in scope.get("headers", []) if name == b"authorization"]
        known = len(shown) == 1 and hmac.compare_digest(shown[0], EXPECTED)
        if known or scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body"})
PYTHON
    mv "$file" "$modules/sg_key.py"
    export PYTHONPATH=$modules${PYTHONPATH:+:$PYTHONPATH}
    options+=(--middleware sg_key.Keyed)
fi

exec vllm serve "$model" \
    --host "$host" \
    --port "$1" \
    --served-model-name "${MODEL_NAME:-llm}" \
    "${options[@]}"
