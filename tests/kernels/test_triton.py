"""The Triton kernels, without a GPU: run in Triton's interpreter, and compiled for chips that are not here.

Triton decides at its import whether it interprets, so both happen in processes of their own and nothing leaks into the
other tests. On a GPU: tests/gpu/check.py.
"""

import ctypes
import mmap
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import distclip
from distclip.kernels import triton
from distclip.kernels.triton import choice, table as tables
from distclip.kernels.triton.table import DTYPES, KEPT, Table, fits, table_of
from gpu.cases import CASES, wrong
from support.ranks import LIMIT
from support.samples import most, rare

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or find_spec("numpy") is None,
    reason="Triton and numpy are not installed (CPU builds of torch bring neither): pip install triton numpy",
)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets its kernels on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONWARNINGS", "ignore")  # numpy warns of the overflows that the kernels are written for
        pool = ProcessPoolExecutor(1, get_context("spawn"))
        assert pool.submit(triton.available, CPU).result()
    with pool:
        yield pool


OTHER = ("bfloat16", "float16", "float64")
LESS = [
    *(f"sizes-{dtype}-{p}" for dtype in OTHER for p in (1.0, 3.0, 0.5, 3.7)),
    *(f"bad_elements-{dtype}-{p}" for dtype in OTHER for p in (1.0, 3.7)),
    "many",
]


@needs_triton
@pytest.mark.parametrize("name", most([pytest.param(name, id=name) for name in CASES], *LESS))
def test_in_the_interpreter(interpreter, name):
    assert interpreter.submit(wrong, name, "cpu").result() == []


def scale_unreadable(factor: float) -> None:
    """Scale memory that may be neither read nor written: a process that tries to is killed."""
    size = 4 * 3 * triton.block_size(torch.float32)
    tensor = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.float32)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(size), 0) == 0
    triton.scale_([tensor[1:]], torch.tensor(factor))


@needs_triton
def test_a_coefficient_of_one_touches_no_gradient(interpreter):
    interpreter.submit(scale_unreadable, 1.0).result()


@needs_triton
@pytest.mark.parametrize("chip", [rare("80", id="A100"), pytest.param("90", id="H100")])
def test_kernels_compile_for_gpus_without_surprises(chip):
    """Real launches, compiled to machine code: vector loads, no spills, no float64 where it costs."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests/gpu/compile.py"), chip]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    faulty = [line for line in done.stdout.splitlines() if not line.endswith('"wrong": []}')]
    assert (done.returncode, faulty) == (0, []), done.stderr


def test_triton_is_imported_only_where_it_runs():
    code = (
        "import sys, torch, distclip\n"
        "from distclip.kernels import triton\n"
        "assert not triton.available(torch.device('cpu')) and not triton.available(torch.device('meta'))\n"
        "assert 'triton' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=LIMIT)


@pytest.fixture
def asking(monkeypatch):
    """DISTCLIP_TRITON=1 in a process that was told nothing yet, on a machine that has what the kernels need."""
    monkeypatch.setenv("DISTCLIP_TRITON", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, empty in (("_told", set()), ("_tried", set()), ("_failed", {})):
        monkeypatch.setattr(choice, name, empty)
    for check in (choice._missing_triton, choice._missing_tools, choice._too_old):
        check.cache_clear()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(choice, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(choice, "find_spec", lambda name: object())
    monkeypatch.setattr(choice.Path, "exists", lambda path: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(choice, "_launch", lambda device: None)
    yield monkeypatch
    for check in (choice._missing_triton, choice._missing_tools, choice._too_old):
        check.cache_clear()


def told(device: torch.device) -> list[str]:
    """What is said of a device the first time, and that nothing is the second."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        choice.check_choice([device])
        said = [str(warning.message) for warning in caught]
        choice.check_choice([device, device])
    assert len(caught) == len(said), "said twice"
    return said


GPU = torch.device("cuda", 0)


def fail(device: torch.device) -> None:
    raise subprocess.CalledProcessError(1, ["gcc", "launcher.c"])


HINDRANCES = {
    "no C compiler": ("which", lambda name: None, "C compiler"),
    "no headers": ("Path.exists", lambda path: False, "Python.h is not there"),
    "no Triton": ("find_spec", lambda name: None, "Triton is not installed"),
    "a first launch that fails": ("_launch", fail, "CalledProcessError"),
}


@pytest.mark.parametrize("name", HINDRANCES)
def test_a_wish_for_triton_that_cannot_be_met_is_told_once_with_the_reason(asking, name):
    where, instead, words = HINDRANCES[name]
    asking.setattr(f"distclip.kernels.triton.choice.{where}", instead)
    assert [line for line in told(GPU) if "DISTCLIP_TRITON=1 has no effect" in line and words in line]
    assert not triton.chosen(GPU)


def test_an_old_gpu_another_build_and_no_gpu_at_all_are_told(asking):
    asking.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "cuda:0 has 7.5" in told(GPU)[0]
    asking.setattr(torch.version, "cuda", None)
    assert "not built for CUDA" in told(GPU)[0]
    assert "gradients are on cpu" in told(CPU)[0]
    asking.setenv("TRITON_INTERPRET", "1")
    assert "gradients are on cuda:0" in told(GPU)[0]
    assert told(CPU) == []


def test_a_wish_for_triton_in_other_words_is_told_how_to_say_it(asking):
    asking.setenv("DISTCLIP_TRITON", "true")
    assert told(GPU) == ["DISTCLIP_TRITON=true has no effect: set it to 1; torch's kernels are used"]
    for silent in ("0", ""):
        asking.setenv("DISTCLIP_TRITON", silent)
        assert told(CPU) == []


def test_a_wish_for_triton_that_is_met_or_was_not_made_says_nothing(asking):
    assert told(GPU) == []
    assert triton.chosen(GPU)
    choice.check_choice([GPU, CPU])  # an offloaded gradient beside those on the GPU
    asking.delenv("DISTCLIP_TRITON")
    assert told(CPU) == []
    assert not triton.chosen(GPU)


def test_a_clipper_without_a_gpu_tells_that_triton_has_no_effect_and_clips(asking):
    model = torch.nn.Linear(3, 1)
    with pytest.warns(RuntimeWarning, match="DISTCLIP_TRITON=1 has no effect: gradients are on cpu"):
        clipper = distclip.Clipper(model, 1.0)
    (model.weight.sum() * 4).backward()
    assert clipper.clip_().norm.item() == pytest.approx(48**0.5)
    distclip.Clipper(model, 1.0)


def dense() -> dict[str, Tensor]:
    x = torch.zeros(4, 6, 5, 5)
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.permute(3, 1, 0, 2),
        "inside": x.view(-1)[3:70],
        "scalar": x[0, 0, 0, 0],
        "column": x.view(-1, 1).expand(-1, 1),
        "pairs": torch.view_as_real(torch.zeros(3, 4, dtype=torch.complex64).t()),
    }


def gappy() -> dict[str, Tensor]:
    x = torch.zeros(4, 6)
    return {
        "slice": x[:, 1:],
        "strided": x.view(-1)[::2],
        "expanded": x[0].expand(3, 6),
        "windows": x.view(-1).as_strided((3, 2), (1, 1)),
        "complex": x.to(torch.complex64),
        "integers": x.int(),
    }


@pytest.mark.parametrize("name", dense())
def test_dense_tensors_fit(name):
    assert fits(dense()[name])


@pytest.mark.parametrize("name", gappy())
def test_tensors_with_gaps_and_other_dtypes_do_not_fit(name):
    assert not fits(gappy()[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_table_covers_every_element_once(dtype):
    memory = torch.zeros(200_000, dtype=dtype)
    block = triton.block_size(dtype)
    tensors = [memory[3:4], memory[7 : 7 + block], memory[50_000:150_001], memory[150_001 : 150_001 + block - 9]]
    table = table_of(tensors, (5, 6, 7, 8))
    assert isinstance(table, Table)
    blocks = table.row_of_block.tolist()
    for row, (line, begin, end, first, place) in enumerate(table.rows.tolist()):
        assert line % 128 == 0
        assert line + begin * dtype.itemsize == tensors[row].data_ptr()
        assert (end - begin, place) == (tensors[row].numel(), row + 5)
        count = blocks.count(row)
        assert blocks[first : first + count] == [row] * count
        assert (count - 1) * block < end <= count * block


@dataclass(frozen=True)
class OnGpu:
    """What a table asks of a tensor on a GPU; the table itself is made on the CPU."""

    address: int
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    is_cuda: bool = True

    def data_ptr(self) -> int:
        return self.address

    def numel(self) -> int:
        return 100


@pytest.fixture
def gpu(monkeypatch):
    """A GPU's current stream, and whether it is being captured."""
    state = SimpleNamespace(cuda_stream=1, capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(tables, "recent", {})
    monkeypatch.setattr(tables, "captured", {})
    return state


def test_a_table_is_copied_again_for_another_stream(gpu):
    first = table_of([OnGpu(1024)], [0])
    assert table_of([OnGpu(1024)], [0]) is first
    gpu.cuda_stream = 2  # does not wait for the copy on stream 1
    second = table_of([OnGpu(1024)], [0])
    assert second is not first
    assert torch.equal(second.rows, first.rows)
    assert len(tables.recent) == 1


def test_a_capture_copies_nothing_and_keeps_the_table_that_it_read(gpu):
    warm = table_of([OnGpu(1024)], [0])
    gpu.cuda_stream, gpu.capturing = 2, True
    assert table_of([OnGpu(2048)], [0]) is None  # new addresses: torch's kernels
    assert table_of([OnGpu(1024)], [0]) is warm  # a capture starts after everything before it
    gpu.capturing = False
    read = weakref.ref(warm.rows)
    del warm
    for i in range(2 * KEPT):
        table_of([OnGpu(4096 * i)], [0])
    assert read() is not None
    assert len(tables.recent) == KEPT


def test_a_table_that_no_capture_read_is_forgotten(gpu):
    forgotten = weakref.ref(table_of([OnGpu(1024)], [0]).rows)
    for i in range(KEPT):
        table_of([OnGpu(4096 * (i + 1))], [0])
    assert forgotten() is None
