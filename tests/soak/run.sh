#!/usr/bin/env bash
# 100,000 steps on one process and on two, by Clipper, by clip_grad_norm_ and without clipping, which shows what torch
# does by itself: one line of JSON for each rank.
# Fails if a rank grows by 5 MB, leaks a descriptor or a thread, or takes 1.1 times the CPU time at the end.
#   STEPS=20000 bash tests/soak/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 PYTHONPATH=.
code=0
for ranks in 1 2; do
    for way in clipper function none; do
        "${PYTHON:-python}" tests/soak/soak.py --ranks "$ranks" --way "$way" --steps "${STEPS:-100000}" || code=1
    done
done
exit "$code"
