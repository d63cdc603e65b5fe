#!/usr/bin/env bash
# A job on this machine only: launch/local.sh configs/quickstart.yaml [key=value ...]
# Unlike a plain `distclip train`, it restarts failed ranks from their last checkpoint, and has a deadline.
# The settings are those of launch/multinode.sh: NPROC_PER_NODE, JOB, RUN_DIR, MAX_RESTARTS, DEADLINE ...
set -euo pipefail
export NNODES=1 RDZV_ENDPOINT=127.0.0.1:0 # any free port
exec bash "$(dirname "${BASH_SOURCE[0]}")/multinode.sh" "$@"
