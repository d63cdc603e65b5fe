"""The compiled kernel by each compiler of this machine, built once for many tests: gcc 12 takes 6 s."""

from pathlib import Path

import pytest

from kernels.test_native import COMPILERS, compiled


@pytest.fixture(scope="session")
def by_compilers(tmp_path_factory) -> list[Path]:
    return [compiled(each, tmp_path_factory.mktemp(each)) for each in COMPILERS]
