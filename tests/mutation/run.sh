#!/usr/bin/env bash
# How many of the core's possible mistakes do the tests notice? See README.md beside this file.
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 LAW_EXAMPLES="${LAW_EXAMPLES:-12}"
exec "${PYTHON:-python}" mutate.py "$@"
