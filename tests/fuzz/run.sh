#!/usr/bin/env bash
# 10,000 cases of each fuzz test, drawn anew every time; CI runs the same tests on some dozens. Arguments go to pytest.
#   bash tests/fuzz/run.sh                      # all, one process a core
#   FUZZ_EXAMPLES=100000 bash tests/fuzz/run.sh -k any_state
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 FUZZ_EXAMPLES="${FUZZ_EXAMPLES:-10000}"
exec "${PYTHON:-python}" -m pytest -q -n auto --durations 0 --durations-min 1 -o faulthandler_timeout=0 tests/fuzz "$@"
