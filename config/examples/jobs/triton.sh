#!/bin/bash
# Triton Inference Server, HTTP only. Health: /v2/health/ready
# MODELS, TRITON_IMAGE and BIND_HOST can be set in "env" of services.json.
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --mem=32G
#SBATCH --time=08:00:00
set -euo pipefail

models=${MODELS:-$HOME/models/triton} # a model repository
# Where to listen: 0.0.0.0 for tunnel "auto" and "none", 127.0.0.1 for "node-loopback".
host=${BIND_HOST:-0.0.0.0}

if [ -n "${SLURMGATE_API_KEY:-}" ]; then
    # Its keys (--http-restricted-api) are arguments, which everybody on the node sees.
    echo 'Triton cannot keep a key: set "upstream_key" to false and "tunnel" to "node-loopback"' >&2
    exit 1
fi

server=(tritonserver)
if [ -n "${TRITON_IMAGE:-}" ]; then # made with `apptainer pull`
    server=(apptainer exec --nv --bind "$models" "$TRITON_IMAGE" tritonserver)
fi

# The other two listeners have fixed ports, which a second job on the node would find taken.
exec "${server[@]}" \
    --model-repository="$models" \
    --http-address="$host" \
    --http-port="$1" \
    --allow-grpc=false \
    --allow-metrics=false
