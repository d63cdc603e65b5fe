#!/usr/bin/env bash
# The whole fault suite, or what its options choose: tests/faults/run.sh [--only NAME] [--jobs N] [-v]. Takes 16
# minutes on two cores; prints one row a fault and fails if any run is against its contract. See docs/explanation/faults.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 # ranks share the cores already
exec "${PYTHON:-python3}" tests/faults/whole.py "$@"
