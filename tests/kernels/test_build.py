"""What hatch_build.py makes of a source tree: a wheel with the kernel or a pure one, never a failure."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import distclip
from distclip.kernels.native.library import library
from kernels.test_native import COMPILERS, ROOT, compiles
from support.ranks import LIMIT


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """What a wheel is built from."""
    copy: Path = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "hatch_build.py"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "distclip", copy / "distclip", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return copy


def build(tree: Path, folder: Path, **settings: str) -> tuple[list[str], list[str], str]:
    """The libraries in the wheel, its tags, and what the build said."""
    clean = {name: value for name, value in os.environ.items() if name != "CC"}
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=tree,
        env=clean | settings,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    packed = zipfile.ZipFile(wheel)
    (record,) = (name for name in packed.namelist() if name.endswith("/WHEEL"))
    facts = packed.read(record).decode().splitlines()
    names = [name for name in packed.namelist() if Path(name).suffix == ".so"]
    return names, [line for line in facts if line.startswith(("Root", "Tag"))], done.stdout + done.stderr


@compiles
@pytest.mark.skipif(sys.platform != "linux", reason="is built on Linux")
def test_a_wheel_with_the_kernel_says_its_platform(tree, tmp_path):
    stale = tree / "distclip" / "kernels" / "native" / f"{library().stem.rpartition('-')[0]}-0123456789abcdef.so"
    stale.touch()
    names, facts, said = build(tree, tmp_path, CC=COMPILERS[0])
    assert names == [f"distclip/kernels/native/{library().name}"]
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert facts == ["Root-Is-Purelib: false", f"Tag: py3-none-{platform}"]
    assert "warning" not in said.lower()
    assert not stale.exists()


def test_links_of_the_readme_work_on_the_index(tree):
    said = subprocess.run([sys.executable, "-m", "hatchling", "metadata"], cwd=tree, capture_output=True, timeout=LIMIT)
    text = json.loads(said.stdout)["readme"]["text"]
    targets = re.findall(r'\]\(([^)]+)\)|(?:src|srcset)="([^"]+)"', text)
    assert len(targets) > 20
    for link, picture in targets:
        assert (link or picture).startswith(("https://", "#"))
        assert f"/v{distclip.__version__}/" in (link or picture) or not (link or picture).endswith((".md", ".png"))


@compiles
@pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="asks for SSE3, which x86-64 begins without")
def test_a_library_runs_on_any_processor_whatever_the_compiler_is_told(tmp_path):
    (tmp_path / "asks.c").write_text("#ifdef __SSE3__\n#error this processor alone\n#endif\n")
    native_only, file = [COMPILERS[0], "-march=native"], tmp_path / "asks.c"
    compile_to = runpy.run_path(str(ROOT / "hatch_build.py"))["compile_to"]
    assert subprocess.run([*native_only, "-fsyntax-only", str(file)], capture_output=True).returncode != 0
    assert compile_to(tmp_path / "sums-0.so", [file], native_only) is None


def test_a_pure_wheel_holds_no_library_of_an_earlier_build(tree, tmp_path):
    left = tree / "distclip" / "kernels" / "native" / library().name
    left.touch()
    (tree / ".gitignore").rename(tmp_path / "kept")  # a source archive has none
    try:
        assert build(tree, tmp_path / "dist", DISTCLIP_NATIVE="0")[0] == []
    finally:
        (tmp_path / "kept").rename(tree / ".gitignore")
        left.unlink()


FAILING = {
    "there is none": ({"CC": "/nonexistent/cc"}, "no C compiler"),
    "none on the path": ({"PATH": "/nonexistent"}, "no C compiler"),
    "it fails": ({"CC": "{folder}/cc fails"}, "fails ended with 3 no such header"),
    "it makes nothing": ({"CC": "true"}, "true ended with 0"),
    "it is no program": ({"CC": "{folder}/text"}, "Exec format error"),
    "it is not wanted": ({"DISTCLIP_NATIVE": "0"}, ""),
}


@pytest.mark.parametrize("case", FAILING)
def test_without_a_compiler_that_works_the_wheel_is_pure(case, tree, tmp_path):
    for name, text in {"cc": "#!/bin/sh\necho 'no such header' >&2\nexit 3\n", "text": "\0"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    settings, expected = FAILING[case]
    names, facts, said = build(tree, tmp_path / "dist", **{k: v.format(folder=tmp_path) for k, v in settings.items()})
    assert names == []
    assert facts == ["Root-Is-Purelib: true", "Tag: py3-none-any"]
    lines = [line for line in said.splitlines() if "no compiled kernel" in line]
    assert len(lines) == (expected != "")
    assert all(expected in line for line in lines)
