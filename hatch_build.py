"""Build the compiled kernel of distclip/kernels/native/ where there is a C compiler; else the wheel is pure Python.

DISTCLIP_NATIVE=0 builds none, CC names the compiler. A compiler that fails does not fail the install.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("distclip", "kernels", "native")
FLAGS = ["-std=c11", "-O3", "-fPIC", "-shared", "-pthread"]
# A wheel is for every machine of its platform, whatever CC says (gcc -march=native): the kernel picks AVX2 and AVX-512
# when it is loaded. The last -march counts.
BASELINE = {"linux-x86_64": ["-march=x86-64"], "linux-aarch64": ["-march=armv8-a"]}
LIMIT = 600  # seconds: gcc 12 takes 6, and took 120 where a hundred processes wanted two cores


class NativeKernel(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build, and say in ``build_data`` what the wheel then holds and where it runs."""
        library, problem = build(Path(self.root), os.environ)
        if problem is not None:
            self.app.display_warning(f"distclip: no compiled kernel, sums are torch's: {problem}")
        if library is not None:
            build_data["artifacts"].append(library.relative_to(self.root).as_posix())
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{re.sub(r'[-.]', '_', sysconfig.get_platform())}"


def build(root: Path, environment: Mapping[str, str]) -> tuple[Path | None, str | None]:
    """The library, built anew; or None, and why, unless it was not wanted."""
    if environment.get("DISTCLIP_NATIVE") == "0":
        return None, None
    if sys.platform != "linux":
        return None, f"not tried on {sys.platform}"
    compiler = compiler_of(environment)
    if compiler is None:
        return None, "no C compiler (CC, cc, gcc, clang)"
    library: Path = runpy.run_path(str(root / NATIVE / "library.py"))["library"]()
    problem = compile_to(library, sorted((root / NATIVE).glob("*.c")), compiler)
    return (library, None) if problem is None else (None, problem)


def compiler_of(environment: Mapping[str, str]) -> list[str] | None:
    """The words of CC, or the first of the usual names that is there."""
    words = environment.get("CC", "").split()
    choices = [words] if words else [["cc"], ["gcc"], ["clang"]]
    return next((words for words in choices if shutil.which(words[0], path=environment.get("PATH"))), None)


def compile_to(library: Path, sources: Sequence[Path], compiler: list[str]) -> str | None:
    """Compile, or say why not. The library appears whole, in place of those of other sources for this platform."""
    try:
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
            new = Path(folder, library.name)
            flags = FLAGS + BASELINE.get(sysconfig.get_platform(), [])
            command = [*compiler, *flags, "-o", str(new), *map(str, sources)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
            if done.returncode != 0 or not new.exists():
                said = done.stderr.strip().partition("\n")[0]
                return f"{' '.join(compiler)} ended with {done.returncode} {said}".strip()
            for old in library.parent.glob(f"{library.stem.rpartition('-')[0]}-*{library.suffix}"):
                old.unlink(missing_ok=True)
            new.replace(library)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None
