#!/usr/bin/env bash
# A real Prometheus server scrapes a training: Debian's package, unpacked into a folder of its own and not installed.
# Arguments go to pytest. PYTHON=... chooses the Python that has distclip and pytest.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
apt-get download prometheus
dpkg-deb -x prometheus_*.deb .
cd "$root"
PATH=$folder/usr/bin:$PATH "${PYTHON:-python}" -m pytest tests/telemetry/test_prometheus_server.py "$@"
