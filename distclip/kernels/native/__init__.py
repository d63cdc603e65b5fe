"""Sums of squares on the CPU by a compiled loop, where the install found a C compiler.

The library of these sources and this platform is there, or it is not; ``DISTCLIP_NATIVE=0`` leaves it alone. ctypes
releases the GIL during the call.
"""

import os
from array import array
from collections.abc import Callable, Sequence
from ctypes import CDLL, c_double, c_int, c_size_t, c_void_p
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from ..memory import check_memory
from .library import library

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as sums.c numbers them
PORTABLE, AVX2 = 0, 1
PLAIN = {Tensor, torch.nn.Parameter}  # other classes may keep their elements elsewhere

dtype_of = attrgetter("dtype")
on_cpu = attrgetter("is_cpu")


def load(file: Path) -> CDLL | None:
    """The library, None where it is not there or not wanted; an ImportError where it is not of this machine."""
    if os.environ.get("DISTCLIP_NATIVE") == "0" or not file.exists():
        return None
    try:
        found = CDLL(str(file))
    except OSError as error:
        raise ImportError(
            f"distclip's compiled kernel cannot be loaded here ({error}): install distclip again on this machine, "
            "or set DISTCLIP_NATIVE=0"
        ) from error
    found.distclip_sum_of_squares.restype = c_double
    found.distclip_sum_of_squares.argtypes = [c_void_p, c_void_p, c_size_t, c_int, c_int, c_int]
    return found


loaded = load(library())
kernel: Callable[..., float] | None = None if loaded is None else loaded.distclip_sum_of_squares
instructions: int = PORTABLE if loaded is None else loaded.distclip_instructions()


def name() -> str:
    """What sums squares of fp32, bf16 and fp16 numbers on this CPU."""
    if kernel is None:
        return "torch's kernels"
    return "compiled, AVX2" if instructions == AVX2 else "compiled"


def sum_of_squares(tensors: Sequence[Tensor]) -> tuple[float, Sequence[Tensor]]:
    """The sum of squares of the tensors that the compiled kernel reads, in float64; and the other tensors.

    It reads fp32, bf16 and fp16 tensors on the CPU that are contiguous, also as channels-last; all are others where no
    library was built. It takes as many threads as torch, and gives the same bits for any number. RuntimeError where the
    memory of a tensor was freed.
    """
    if kernel is None:
        return 0.0, tensors
    total, others = 0.0, list[Tensor]()
    dtypes = list(map(dtype_of, tensors))
    kinds = dict.fromkeys(dtypes)
    for dtype in kinds:
        same = tensors if len(kinds) == 1 else [t for t, its in zip(tensors, dtypes, strict=True) if its is dtype]
        read = _readable(same) if dtype in KINDS else []
        if read:
            total += _sum_of(KINDS[dtype], read)
        if len(read) < len(same):
            done = set(map(id, read))
            others += [t for t in same if id(t) not in done]
    return total, others


def _readable(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Those whose elements lie side by side in the memory of this process."""
    if set(map(type, tensors)) <= PLAIN and all(map(on_cpu, tensors)) and all(map(Tensor.is_contiguous, tensors)):
        return tensors  # 0.1 us each; one by one 0.5
    return [
        t
        for t in tensors
        if type(t) in PLAIN and t.is_cpu and (t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last))
    ]


def _sum_of(kind: int, tensors: Sequence[Tensor]) -> float:
    addresses = array("Q", map(Tensor.data_ptr, tensors))
    numels = array("Q", map(Tensor.numel, tensors))
    check_memory(tensors, addresses)
    assert kernel is not None
    where = addresses.buffer_info()[0], numels.buffer_info()[0]
    return kernel(*where, len(tensors), kind, instructions, torch.get_num_threads())
