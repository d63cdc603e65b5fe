"""The compiled kernel: the same bits on any processor, nothing read that is not there, nothing stale."""

import ctypes
import os
import runpy
import shutil
import subprocess
import sys
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import isnan
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from distclip.kernels import bits_of_each, native, no_bits, power_sum
from distclip.kernels.bits import MODULUS
from distclip.kernels.native.library import library
from distclip.kernels.sums import sum_of_squares
from support.samples import rare

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "distclip" / "kernels" / "native"
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]
WANTED = sys.platform == "linux" and os.environ.get("DISTCLIP_NATIVE") != "0"
FLAGS = ["-std=c11", "-O3", "-fPIC", "-shared", "-pthread"]
STRICT = ["-Wall", "-Wextra", "-Werror"]
BLOCK, WAVE, STEP, SHARE = 1 << 18, 1 << 10, 32, 1 << 21  # as in waves.h and sums.c
REFUSE = """
int asked = 0;
int __wrap_pthread_create(void *thread, void *attributes, void *start, void *argument)
{
    asked++;
    return 11; /* EAGAIN */
}
"""
Kernel = Callable[..., float]

built = pytest.mark.skipif(
    native.name() == "torch's kernels",
    reason="needs the compiled kernel, which this install did not build or DISTCLIP_NATIVE=0 leaves alone",
)
compiles = pytest.mark.skipif(not COMPILERS, reason="needs gcc or clang")


@pytest.fixture(autouse=True)
def _wanted(monkeypatch) -> None:
    monkeypatch.delenv("DISTCLIP_NATIVE", raising=False)


def noise(numel: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(numel + seed)).to(dtype)


def kernel(file: Path) -> Kernel:
    """The sum of tensors of one dtype by this library, ``instructions`` and ``threads`` given; with right integers."""
    loaded = native.load(file)
    assert loaded is not None

    def call(tensors: Sequence[Tensor], instructions: int, threads: int) -> float:
        addresses, numels = (array("Q", map(f, tensors)) for f in (Tensor.data_ptr, Tensor.numel))
        where, bits = (addresses.buffer_info()[0], numels.buffer_info()[0]), no_bits()
        how = len(tensors), native.KINDS[tensors[0].dtype], instructions, threads
        found: float = loaded.distclip_sum_of_squares(*where, *how, bits.buffer_info()[0])
        without = loaded.distclip_sum_of_squares(*where, *how, None)
        assert without == found or (isnan(without) and isnan(found))
        assert bits[0] == int(bits_of_each(tensors).sum()) % MODULUS
        return found

    return call


def compiled(compiler: str, folder: Path) -> list[Path]:
    """Object files, if they are not there yet."""
    if not folder.exists():
        folder.mkdir()
        subprocess.run([compiler, *FLAGS, *STRICT, "-c", *map(str, SOURCES.glob("*.c"))], check=True, cwd=folder)
    return list(folder.glob("*.o"))


def linked(compiler: str, folder: Path, *words: str | Path) -> Path:
    file = folder / f"{compiler}.so"
    subprocess.run([compiler, *FLAGS, "-o", str(file), *map(str, words)], check=True)
    return file


SETS = {
    "the edges of steps": lambda: [
        noise(n, torch.float32) for n in (0, 1, 7, STEP - 1, STEP, STEP + 1, 0, 3 * STEP + 5)
    ],
    "the edges of blocks": lambda: [noise(BLOCK + n, torch.float32) for n in (-1, 0, 1, STEP, BLOCK + 3)],
    "work for three threads": lambda: [noise(n, torch.float32) for n in (3 * SHARE + 5, 1000, BLOCK + 1)],
    "more blocks than a wave": lambda: [noise(1 + k % 4000, torch.float32, k) for k in range(2 * WAVE + 7)],
}


@built
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", native.KINDS, ids=str)
def test_same_bits_for_any_threads_and_instructions(name, dtype, by_compilers):
    tensors = [t.to(dtype) for t in SETS[name]()]
    calls = [kernel(library()), *map(kernel, by_compilers)]
    instructions = {native.PORTABLE, native.instructions}
    found = {call(tensors, i, threads) for call in calls for i in instructions for threads in (1, 2, 3)}
    assert len(found) == 1
    assert found.pop() == pytest.approx(sum(t.double().square().sum().item() for t in tensors), rel=1e-12)


@compiles
@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_caller_does_the_work_of_threads_that_cannot_be_made(compiler, tmp_path, objects):
    (tmp_path / "refuse.c").write_text(REFUSE)
    file = linked(compiler, tmp_path, "-Wl,--wrap=pthread_create", tmp_path / "refuse.c", *objects[compiler])
    asked = ctypes.c_int.in_dll(ctypes.CDLL(str(file)), "asked")
    tensors = [noise(2 * SHARE, torch.float32)]
    alone = kernel(file)(tensors, native.PORTABLE, 1)
    assert asked.value == 0
    assert kernel(file)(tensors, native.PORTABLE, 2) == alone
    assert kernel(file)([tensors[0][:-1]], native.PORTABLE, 2) < alone
    assert asked.value == 2  # with integers and without; not for the smaller one


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("instructions", ["portable", "best"])
@pytest.mark.parametrize("together", [STEP + 1, rare(1)])
def test_every_number_of_16_bits(dtype, instructions, together):
    """Alone, or a step and one more of neighbours, whose squares add up exactly."""
    call = partial(kernel(library()), threads=1)
    which = native.PORTABLE if instructions == "portable" else native.instructions
    for numbers in torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).split(together):
        squares = numbers.double().square().sum().item()
        assert call([numbers], which) == pytest.approx(squares, rel=0, abs=0, nan_ok=True)


@built
@pytest.mark.parametrize("dtype", native.KINDS, ids=str)
def test_any_address(dtype):
    numbers = noise(1000, dtype)
    memory = bytearray(8 + numbers.nbytes)
    for offset in range(8):
        moved = torch.frombuffer(memory, dtype=dtype, count=1000, offset=offset).copy_(numbers)
        assert moved.data_ptr() % 8 == (torch.frombuffer(memory, dtype=torch.uint8).data_ptr() + offset) % 8
        assert power_sum([moved], 2.0) == power_sum([numbers], 2.0)


@built
def test_it_reads_what_it_can_and_leaves_the_rest():
    base = noise(60, torch.float32).view(6, 10)
    read = [base, torch.nn.Parameter(base.clone()), torch.zeros(0), noise(5, torch.bfloat16), noise(5, torch.float16)]
    read.append(base.view(1, 3, 4, 5).to(memory_format=torch.channels_last))
    left = [
        base.double(),
        base[:, 1:3],
        base.to("meta"),
        TwoTensor(base, base),
        torch.view_as_complex(base.view(-1, 2)),
    ]
    total, others = sum_of_squares([left[0], *read, *left[1:]])
    assert [id(t) for t in others] == [id(t) for t in left]
    assert total == pytest.approx(sum(t.double().square().sum().item() for t in read), rel=1e-12)


@built
def test_freed_memory_is_an_error_and_no_crash():
    whole = torch.ones(100)
    part = whole[7:]
    whole.untyped_storage().resize_(0)
    for freed in (whole, part):
        with pytest.raises(RuntimeError, match="its storage was freed"):
            power_sum([torch.ones(3), freed], 2.0)


@built
def test_python_threads_at_once():
    tensors = [noise(3 * BLOCK + k, torch.float32) for k in range(8)]
    alone = [power_sum([t], 2.0) for t in tensors]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda t: power_sum([t], 2.0), tensors)) == alone


# ---- the library: there and of these sources, or not ---------------------------------------------------------


@compiles
@pytest.mark.skipif(not WANTED, reason="is built on Linux, unless DISTCLIP_NATIVE=0")
def test_it_was_built_where_a_compiler_is():
    assert native.name() != "torch's kernels", "launch/test.sh builds it; or install distclip again"


def test_a_library_of_other_sources_is_another_file(tmp_path):
    for source in SOURCES.iterdir():
        if source.suffix in (".c", ".h", ".py"):
            shutil.copy(source, tmp_path)

    def named() -> Path:
        return runpy.run_path(str(tmp_path / "library.py"))["library"]()

    before = named()
    assert before == tmp_path / library().name
    for changed in ("sums.c", "scale.c", "waves.h"):
        (tmp_path / changed).write_text((tmp_path / changed).read_text() + "\n")
        assert named() != before
        before = named()


@built
def test_it_is_not_loaded_where_it_is_not_wanted(monkeypatch):
    assert native.load(library()) is not None
    monkeypatch.setenv("DISTCLIP_NATIVE", "0")
    assert native.load(library()) is None


def test_a_library_that_does_not_fit_is_said(tmp_path):
    (tmp_path / "sums.so").write_bytes(b"of another machine")
    with pytest.raises(ImportError, match="install distclip again on this machine, or set DISTCLIP_NATIVE=0"):
        native.load(tmp_path / "sums.so")


@compiles
def test_the_compiler_has_nothing_to_say(objects):
    sources = {file.stem for file in SOURCES.glob("*.c")}
    assert [{file.stem for file in files} for files in objects.values()] == [sources] * len(COMPILERS)
