# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: `make_environment EXTRAS` makes a virtual environment with this repository,
# editable, and those extras, or does nothing if that was done before.
#
#   VENV    where it lives                  (default: .venv in the repository)
#   PYTHON  what it is made from, 3.11+     (default: the first of python3, python3.14 ... python3.11 that works)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$1" >&2
    exit 1
}

will_do() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local name
    if [[ -n ${PYTHON:-} ]]; then
        will_do "$PYTHON" || fail "PYTHON=$PYTHON is no Python 3.11 or newer with venv and ensurepip"
        printf '%s\n' "$PYTHON"
        return
    fi
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if will_do "$name"; then
            printf '%s\n' "$name"
            return
        fi
    done
    fail "needs Python 3.11 or newer with venv (on Debian: apt install python3-venv); PYTHON=... names another"
}

# What an installation was made for: if a line of it changes, pip runs again.
fingerprint() {
    {
        printf '%s\n' "$root" "$1" "${PYTHON:-}" "${CC:-}" "${DISTCLIP_NATIVE:-}"
        "$venv/bin/python" --version 2>&1 || true
        cat "$root/pyproject.toml" "$root/constraints.txt" "$root/hatch_build.py"
        cat "$root/distclip/kernels/native"/*.[ch]
        printf '%s\n' "$root/distclip/kernels/native"/*.so # gone: built again
        grep '^__version__' "$root/distclip/__init__.py"
    } | cksum
}

# A torch that comes with the Python, as in a GPU container, is used if it is the version of constraints.txt.
site_packages_option() {
    "$1" - "$root/constraints.txt" <<'END'
import importlib.metadata, pathlib, sys
pinned = [line.strip() for line in pathlib.Path(sys.argv[1]).read_text().splitlines()]
try:
    found = importlib.metadata.version("torch").partition("+")[0]
except importlib.metadata.PackageNotFoundError:
    sys.exit()
if f"torch=={found}" in pinned and sys.prefix == sys.base_prefix:  # a virtual environment does not pass its own on
    print("--system-site-packages")
END
}

make_environment() {
    local extras=$1 python option stamp=$venv/installed-${1//,/-}
    if [[ -f $stamp && ! -e $venv/unfinished && $(<"$stamp") == "$(fingerprint "$extras")" ]]; then
        return
    fi
    if [[ -e $venv && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
        fail "$venv is there and is no virtual environment: set VENV to another folder"
    fi
    python=$(find_python)
    if ! "$venv/bin/python" -c 'import pip' 2>/dev/null ||
        [[ -n ${PYTHON:-} && $("$python" --version) != $("$venv/bin/python" --version) ]]; then
        option=$(site_packages_option "$python")
        "$python" -m venv --clear ${option:+"$option"} "$venv" || fail "could not make $venv with $python"
    fi
    [[ ! -e $venv/unfinished ]] || rm -f "$venv"/installed-* # nothing is certain after an interrupted install
    touch "$venv/unfinished"
    printf 'installing into %s (the first time takes a minute or two, most of it torch)\n' "$venv"
    SECONDS=0
    (cd "$root" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable ".[$extras]") || fail "pip could not install .[$extras]; see above"
    fingerprint "$extras" >"$stamp"
    rm "$venv/unfinished"
    printf 'installed in %d s\n' "$SECONDS"
}
