#!/usr/bin/env bash
# Neighbours, for real: installs one beside distclip, in a virtual environment of its own, and runs with_<name>.py there.
# Not in CI: it takes minutes, and needs a package index. Figures: docs/neighbours.
#
#   bash tests/neighbours/run.sh torchtitan [BACKEND [LAYOUT,...]]
#   bash tests/neighbours/run.sh torchft [ddp] [fsdp2] [diloco]
#   bash tests/neighbours/run.sh trl-peft
#
#   PYTHON   the Python that makes the environment
#   VENV     a folder for it, which is kept and used again
#   TORCH    a requirement, as in 'torch==2.14.1'
#
# Exit code 0: all as promised. 1: not. 3: not tried, since something could not be installed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
name=${1:-}
shift || true

case $name in
    torchtitan) packages=("${TORCH:-torch>=2.14}" torchtitan==0.3.0 triton) ;; # imports triton, also without a GPU
    torchft) packages=("${TORCH:-torch==2.13.0}" torchft-nightly numpy) ;;
    trl-peft) packages=("${TORCH:-torch==2.13.0}" trl==1.16.0 peft==0.21.2 'transformers>=5.24,<6') ;;
    *) sed -n '2,/^$/p' "${BASH_SOURCE[0]}" >&2 && exit 2 ;;
esac

venv=${VENV:-$(mktemp -d)}
[[ -n ${VENV:-} ]] || trap 'rm -rf -- "$venv"' EXIT
[[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"
if ! "$venv/bin/python" -m pip install --quiet "${packages[@]}" 2>"$venv/pip.log"; then
    printf 'run.sh: NOT TRIED: %s\n' "$(grep ERROR "$venv/pip.log" | head -n 1)"
    exit 3
fi

export PYTHONPATH=$root OMP_NUM_THREADS=1
cd "$venv" # torchtitan leaves a folder of outputs
"$venv/bin/python" "$root/tests/neighbours/with_${name//-/_}.py" "$@"
