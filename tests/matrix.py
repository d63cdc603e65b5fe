"""Run the tests of the core on other versions of torch and Python, and write the table of docs/reference/support.md.

    python tests/matrix.py                # every combination of CELLS
    python tests/matrix.py 2.14.1/3.11    # some

Each gets an environment of its own, with a CPU build of torch (`torch==2.14.1+cpu`) from PyTorch's index, or from where
pip is told to look; where neither has one, with PyPI's build, which for Linux is one for CUDA (5 GB) and brings Triton,
so that the tests of its kernels run too. What cannot be had here is a row with the reason, unless an earlier run has
filled it. Exit code 0: all of them ran, and no test failed.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "support.md"
INDEX = "https://download.pytorch.org/whl/cpu"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
CELLS = [f"{torch}/3.11" for torch in ("2.6.0", "2.11.0", "2.13.0", "2.14.1", "2.15.0")]
CELLS += [f"2.13.0/{python}" for python in PYTHONS[1:]]
PACKAGES = ("promises", "clipper", "layouts", "kernels")
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "hatchling", "hatch-fancy-pypi-readme")
TOOLS += ("numpy<2.4",)  # newer ones break the interpreter of Triton 3.6, which torch 2.11 brings
ROW = re.compile(r"^\| (\d[\d.]*) \| (3\.\d+) \| (.*) \|$", re.MULTILINE)
LIMIT = 2 * 3600  # seconds, for each step of a combination


class NotHere(Exception):
    """Why a combination cannot be had on this machine."""


def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=LIMIT, cwd=ROOT)


def environment(torch: str, version: str, folder: Path) -> Path:
    """The Python of a new environment, with torch, this repository and what its tests import."""
    base = shutil.which(f"python{version}")
    if base is None or call(base, "-m", "venv", folder).returncode != 0:
        raise NotHere(f"the machine has no Python {version}")
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    cpu = call(*pip, "--retries=1", "--extra-index-url", INDEX, f"torch=={torch}+cpu")
    if cpu.returncode != 0 and call(*pip, "--no-cache-dir", f"torch=={torch}").returncode != 0:  # several GB, for CUDA
        raise NotHere("no index in reach has it")
    installed = call(*pip, "--editable", ".", *TOOLS)
    assert installed.returncode == 0, installed.stderr
    return python


def tested(python: Path, folder: Path) -> tuple[str, bool]:
    """What the tests said, as two columns of the table, and whether all passed."""
    results = folder / "results.xml"
    folders = [f"tests/{name}" for name in PACKAGES]
    words = ("-q", "-m", "", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider", f"--junitxml={results}")
    done = call(python, "-m", "pytest", *words, *folders)
    if not results.exists():
        return f"no tests ran | {done.stdout.splitlines()[-1:]}", False
    suite = ElementTree.parse(results).getroot()[0]
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    bad = [
        case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    for case in bad:
        print(f"{case.get('name')}: {_message(case)}", flush=True)
    names = ", ".join(f"`{name}`" for name in sorted({str(case.get("name")).partition("[")[0] for case in bad}))
    counts = f"{total - skipped - len(bad)} passed, {len(bad)} failed, {skipped} skipped"
    return f"{counts}, {date.today()} | {names or 'none'}", not bad


def _message(case: ElementTree.Element) -> str:
    """What a test that failed said."""
    found = case.find("failure")
    found = case.find("error") if found is None else found
    return "" if found is None else str(found.get("message"))


def write(cell: str, said: str, *, only_if_empty: bool) -> None:
    """Put one row into the table."""

    def row(match: re.Match[str]) -> str:
        kept = f"{match[1]}/{match[2]}" != cell or (only_if_empty and "passed" in match[3])
        return match[0] if kept else f"| {match[1]} | {match[2]} | {said} |"

    PAGE.write_text(ROW.sub(row, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def run(cell: str) -> bool:
    torch, version = cell.split("/")
    with tempfile.TemporaryDirectory() as folder:
        try:
            said, passed = tested(environment(torch, version, Path(folder, "venv")), Path(folder))
        except NotHere as reason:
            write(cell, f"not run: {reason} | ", only_if_empty=True)
            print(f"{cell}: {reason}", flush=True)
            return False
    write(cell, said, only_if_empty=False)
    print(f"{cell}: {said}", flush=True)
    return passed


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    chosen = sys.argv[1:] or CELLS
    if unknown := set(chosen) - set(CELLS):
        sys.exit(f"none of {', '.join(CELLS)}: {', '.join(sorted(unknown))}")
    sys.exit(0 if all([run(cell) for cell in chosen]) else 1)
