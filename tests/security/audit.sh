#!/usr/bin/env bash
# Risky source, by bandit, and known vulnerabilities of what is installed beside it, by pip-audit. Not in CI: the second
# asks a service on the internet (pypi.org, or osv.dev with AUDIT_SERVICE=osv).
#   .venv/bin/pip install pip-audit bandit; PYTHON=.venv/bin/python bash tests/security/audit.sh
# Exit code 0: nothing found. 1: something found. 3: bandit found nothing, and the service did not answer for all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python}

"$python" -m bandit --quiet --configfile pyproject.toml --recursive distclip launch docker examples hatch_build.py
printf 'audit.sh: bandit found nothing\n'

folder=$(mktemp -d)
trap 'rm -rf -- "$folder"' EXIT
# Versions alone: a local build such as torch 2.13.0+cpu has the vulnerabilities of 2.13.0.
"$python" -m pip freeze --exclude-editable | grep '==' | sed 's/+.*//' >"$folder/packages"
printf 'audit.sh: asking for %d packages\n' "$(wc -l <"$folder/packages")"
code=0
# --strict: without it a package that the service does not know counts as one without vulnerabilities
"$python" -m pip_audit --strict --requirement "$folder/packages" --disable-pip --no-deps --progress-spinner off \
    --vulnerability-service "${AUDIT_SERVICE:-pypi}" --timeout 20 >"$folder/said" 2>&1 || code=$?
if ((code != 0)) && ! grep -q '^Found .* known vulnerabilit' "$folder/said"; then
    tail -n 1 "$folder/said" >&2
    printf 'audit.sh: NOT AUDITED: the service could not be asked, or does not know all of them (see above)\n' >&2
    exit 3
fi
cat "$folder/said"
exit "$code"
