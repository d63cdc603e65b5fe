"""The compiled loops that sum squares and scale on the CPU, where the install found a C compiler: found and named here.

The library of these sources and this platform is there, or it is not; ``DISTCLIP_NATIVE=0`` leaves it alone. ctypes
releases the GIL during the call.
"""

import os
from collections.abc import Callable
from ctypes import CDLL, c_double, c_int, c_size_t, c_void_p
from pathlib import Path

import torch

from .library import library

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as waves.h numbers them
SCALED = frozenset({torch.float32, torch.bfloat16})  # by scale.c
EXACT_KINDS = {**KINDS, torch.float64: 3}  # by exact.c
PORTABLE, AVX2, AVX512 = 0, 1, 2


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
    found.distclip_sum_of_squares.argtypes = [c_void_p, c_void_p, c_size_t, c_int, c_int, c_int, c_void_p]
    for rows, numbers in ((found.distclip_sums_of_squares_of_rows, 2), (found.distclip_multiply_rows, 1)):
        rows.restype = None
        rows.argtypes = [c_void_p] * 3 + [c_size_t, c_int, c_int, c_int] + [c_void_p] * numbers
    found.distclip_exact_sum.restype = None
    found.distclip_exact_sum.argtypes = [c_void_p] * 2 + [c_size_t] + [c_int] * 4 + [c_void_p, c_size_t]
    found.distclip_fingerprints.restype = None
    found.distclip_fingerprints.argtypes = [c_void_p] * 3 + [c_size_t] + [c_int] * 3 + [c_void_p]
    return found


loaded = load(library())
kernel: Callable[..., float] | None = None if loaded is None else loaded.distclip_sum_of_squares
sum_rows: Callable[..., None] | None = None if loaded is None else loaded.distclip_sums_of_squares_of_rows
multiply_rows: Callable[..., None] | None = None if loaded is None else loaded.distclip_multiply_rows
exact_sum: Callable[..., None] | None = None if loaded is None else loaded.distclip_exact_sum
fingerprints: Callable[..., None] | None = None if loaded is None else loaded.distclip_fingerprints
instructions: int = PORTABLE if loaded is None else loaded.distclip_instructions()
widest: int = PORTABLE if loaded is None else loaded.distclip_widest_instructions()  # of exact.c and fingerprint.c


def name() -> str:
    """What sums squares of fp32, bf16 and fp16 numbers on this CPU."""
    if kernel is None:
        return "torch's kernels"
    return "compiled, AVX2" if instructions == AVX2 else "compiled"
