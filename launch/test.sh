#!/usr/bin/env bash
# Everything that must be green: style, types, tests. Arguments go to pytest: launch/test.sh -k norm
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment train,dev
cd "$root"
export OMP_NUM_THREADS=1
failed=()

step() { # name, command...: one line, and the output only if it fails
    local name=$1 output start=$SECONDS
    shift
    if output=$("$venv/bin/$1" "${@:2}" 2>&1); then
        printf '%-12s ok      %3d s\n' "$name" $((SECONDS - start))
    else
        printf '%s\n%-12s FAILED  %3d s\n' "$output" "$name" $((SECONDS - start))
        failed+=("$name")
    fi
}

step "ruff check" ruff check --quiet .
step "ruff format" ruff format --check .
step "mypy" mypy

start=$SECONDS
"$venv/bin/pytest" -q -n auto --maxprocesses 8 --dist worksteal "$@" || failed+=("pytest (exit code $?)")
printf '%-12s %s  %3d s\n' pytest "$([[ ${failed[*]-} == *pytest* ]] && echo FAILED || echo 'ok    ')" $((SECONDS - start))

((${#failed[@]} == 0)) || fail "failed: $(IFS=,; echo "${failed[*]}")"
