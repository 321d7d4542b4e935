#!/bin/bash
# Text Generation Inference of Hugging Face. Health: /health
# MODEL, TGI_IMAGE and BIND_HOST can be set in "env" of services.json.
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --mem=64G
#SBATCH --time=08:00:00
set -euo pipefail

model=${MODEL:-$HOME/models/Qwen3-8B} # a folder as Hugging Face has them
# Where to listen: 0.0.0.0 for tunnel "auto" and "none", 127.0.0.1 for "node-loopback".
host=${BIND_HOST:-0.0.0.0}

if [ -n "${SLURMGATE_API_KEY:-}" ]; then
    # The launcher hands its key to the router as an argument, which everybody on the node sees.
    echo 'TGI cannot keep a key: set "upstream_key" to false and "tunnel" to "node-loopback"' >&2
    exit 1
fi

server=(text-generation-launcher)
if [ -n "${TGI_IMAGE:-}" ]; then # made with `apptainer pull`; its entry point is the launcher
    server=(apptainer run --nv --pwd /usr/src --bind "$model" "$TGI_IMAGE")
fi

# Two jobs on one node must not share the sockets and ports that TGI uses inside; $1 is a port
# of 20000 to 29999 unless services.json says otherwise. The port of its metrics is given as a
# variable, because older versions have no such option.
export PROMETHEUS_PORT=$(($1 + 20000))

# Other people must not be there first, as they could be at a name in /tmp that can be guessed.
sockets=$(mktemp -d /tmp/tgi-XXXXXXXX)

exec "${server[@]}" \
    --model-id "$model" \
    --hostname "$host" \
    --port "$1" \
    --num-shard "${SLURM_GPUS_ON_NODE:-1}" \
    --master-port "$(($1 + 10000))" \
    --shard-uds-path "$sockets/shard"
