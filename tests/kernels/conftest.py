"""The compiled kernel by each compiler of this machine, compiled once for all tests and workers: gcc 12 takes 6 s."""

import fcntl
import os
from pathlib import Path

import pytest

from kernels.test_native import COMPILERS, compiled, linked


@pytest.fixture(scope="session")
def objects(tmp_path_factory) -> dict[str, list[Path]]:
    """The object files of each compiler."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with (shared / "compiling").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return {each: compiled(each, shared / each) for each in COMPILERS}


@pytest.fixture(scope="session")
def by_compilers(objects, tmp_path_factory) -> list[Path]:
    return [linked(each, tmp_path_factory.mktemp(each), *files) for each, files in objects.items()]
