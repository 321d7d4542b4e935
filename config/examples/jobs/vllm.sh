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

if [ -n "${SLURMGATE_API_KEY:-}" ]; then # "upstream_key": true; never an argument: those are seen
    export VLLM_API_KEY=$SLURMGATE_API_KEY
fi

exec vllm serve "$model" \
    --host "$host" \
    --port "$1" \
    --served-model-name "${MODEL_NAME:-llm}" \
    --tensor-parallel-size "${SLURM_GPUS_ON_NODE:-1}"
