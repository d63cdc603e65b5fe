#!/usr/bin/env bash
# The documentation as pages in docs/_build/html: open index.html there. A warning is an error.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"

make_environment docs,tensorboard,mlflow,prometheus,opentelemetry # whose classes are shown with their signatures
cd "$root"
"$venv/bin/sphinx-build" --quiet --fresh-env --write-all --fail-on-warning --keep-going docs docs/_build/html
printf 'built %s\n' "$root/docs/_build/html/index.html"
