#!/bin/bash
# The server of llama.cpp with its OpenAI API. Health: /health
# MODEL, CONTEXT, LLAMA_SERVER and BIND_HOST can be set in "env" of services.json.
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --mem=32G
#SBATCH --time=08:00:00
set -euo pipefail

model=${MODEL:-$HOME/models/model.gguf}
# Where to listen: 0.0.0.0 for tunnel "auto" and "none", 127.0.0.1 for "node-loopback".
host=${BIND_HOST:-0.0.0.0}

if [ -n "${SLURMGATE_API_KEY:-}" ]; then # "upstream_key": true; never an argument: those are seen
    export LLAMA_API_KEY=$SLURMGATE_API_KEY
fi

exec "${LLAMA_SERVER:-llama-server}" \
    --model "$model" \
    --host "$host" \
    --port "$1" \
    --ctx-size "${CONTEXT:-8192}" \
    --threads "${SLURM_CPUS_PER_TASK:-8}" \
    --n-gpu-layers 999
