#!/usr/bin/env bash
# Train the quickstart with norms of all parameters, and take the picture of its report that README.md and report.md
# show. Takes a minute and needs Chromium. PYTHON=... chooses the Python; RUN=folder takes a run that is there.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$root"

run=${RUN:-$folder/quickstart}
if [ ! -e "$run" ]; then
  "$python" -m distclip train configs/quickstart.yaml run.dir="$run" clip.watch=parameters
fi
"$python" -m distclip report "$run" --out "$folder/report.html"
PYTHONPATH=$root:$root/tests "$python" -m reporting.shoot "$folder/report.html" docs/report.png
