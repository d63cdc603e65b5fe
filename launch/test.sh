#!/usr/bin/env bash
# Everything that must pass: style, types, tests. Arguments go to pytest: launch/test.sh -k norm
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

integrations=deepspeed,lightning,accelerate,transformers
sinks=tensorboard,wandb,mlflow,prometheus,opentelemetry
make_environment "train,dev,viz,docs,$integrations,$sinks" # all of it is tested
cd "$root"
export OMP_NUM_THREADS=1 # ranks share the cores already
failed=

report() { # name, exit code, start: one line per step
    local verdict=ok
    if (($2 != 0)); then
        verdict="FAILED ($2)"
        failed+=${failed:+, }$1
    fi
    printf '%-12s %-10s %4d s\n' "$1" "$verdict" $((SECONDS - $3))
}

quietly() { # name, command...: its output is shown only if it fails
    local name=$1 start=$SECONDS output code=0
    shift
    output=$("$venv/bin/$1" "${@:2}" 2>&1) || code=$?
    ((code == 0)) || printf '%s\n' "$output"
    report "$name" "$code" "$start"
}

quietly "ruff check" ruff check .
quietly "ruff format" ruff format --check .
quietly "mypy" mypy
quietly "docs" sphinx-build --quiet --fresh-env --write-all --fail-on-warning --keep-going docs docs/_build/html

# Hundreds of processes import them, and each would compile them again if PYTHONDONTWRITEBYTECODE is set.
"$venv/bin/python" -m compileall -q distclip tests

start=$SECONDS code=0
cores=$(getconf _NPROCESSORS_ONLN)
workers=$((cores < 4 ? 4 : cores < 8 ? cores : 8)) # on two cores half of them wait: for a timeout, for programs that start
"$venv/bin/pytest" -q -n "$workers" --dist worksteal "$@" || code=$?
report pytest "$code" "$start"

[[ -z $failed ]] || fail "failed: $failed"
