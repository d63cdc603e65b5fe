#!/usr/bin/env bash
# Train the quickstart with norms of all parameters, and take the pictures of its report that README.md and report.md
# show. Takes a minute and needs Chromium. PYTHON=... chooses the Python; RUN=folder takes a run that is there.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$root"

if [ -n "${RUN:-}" ]; then
  cp -r "$RUN" "$folder/quickstart"
else
  "$python" -m distclip train configs/quickstart.yaml run.dir="$folder/quickstart" clip.watch=parameters
fi
export PYTHONPATH=$root:$root/tests
(cd "$folder" && "$python" -m distclip report quickstart --out report.html) # so that its path is short
"$python" -m reporting.shoot "$folder/report.html" docs/report.png
"$python" -m reporting.shoot "$folder/report.html" docs/report-dark.png --dark
