#!/bin/sh
# The job script of the test service: serve.sh PORT, in the home directory that all machines share.
#SBATCH --cpus-per-task=1
exec python3 "$HOME/service.py" "$1"
