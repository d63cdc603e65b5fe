#!/usr/bin/env bash
# Train a small model on this machine with distributed clipping: launch/quickstart.sh [trainer arguments]
# For example: launch/quickstart.sh train.steps=50
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment train
exec "$venv/bin/distclip" train "$root/configs/quickstart.yaml" "$@"
