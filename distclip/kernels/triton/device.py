"""The code that runs on the device: three kernels over a table of tensors. Importing this file imports Triton.

A *block* is BLOCK neighbouring elements in memory, the work of one program. Blocks begin at cache lines, not at the
tensor, so a full block is read in 16-byte loads wherever the tensor begins; only a tensor's first and last block may
be partial. A row of the table says where a tensor lies (:mod:`.table`).
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

COLUMNS = tl.constexpr(5)  # int64: address of a cache line, begin, end (elements from there), first block, place
PIECES = tl.constexpr(8)  # a block where speed does not count goes in so many turns, for fewer registers and less code

# A block whose fp32 sum is above TINY lost at most 16384 * 2**-126 / TINY = 2e-8 of it to fp32 underflow, flushed or not
TINY = tl.constexpr(1e-26)


def jit(function: Callable[..., object]) -> Any:
    """triton.jit with a type that mypy can see."""
    return triton.jit(function)


@jit
def block_sums(
    rows: tl.tensor,
    row_of_block: tl.tensor,
    sums: tl.tensor,
    DTYPE: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
) -> None:
    """sums[block] = sum(|x| ** P) over the block, or max(|x|) for P = inf; one program a block.

    ``sums``: float64, one slot a block, so that no order of programs can change a bit. RUN: elements in 16 bytes.
    """
    start, begin, end = _block(rows, row_of_block, DTYPE, BLOCK)
    lane = tl.arange(0, BLOCK)
    if P != 1.0 and P != 2.0 and P != 3.0 and P != float("inf"):
        result = _exact_sum(start, begin, end, P, BLOCK, RUN)
    else:
        # One full and one partial copy of the sum: had they only the loads of their own, all elements would have to
        # meet in registers of one shape, 128 a thread for bf16.
        if (begin <= 0) & (end >= BLOCK):
            result = _quick_sum(tl.load(start + lane), P, RUN)
        else:
            result = _quick_sum(_part(start, lane, begin, end, RUN), P, RUN)
        if DTYPE != tl.float64 and P != float("inf"):
            if not ((result > TINY) & (result < float("inf"))):  # rare: zeros, underflow, overflow, NaN
                result = _exact_sum(start, begin, end, P, BLOCK, RUN)
    tl.store(sums + tl.program_id(0), result)


@jit
def norms_of_rows(
    rows: tl.tensor,
    sums: tl.tensor,
    norms: tl.tensor,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """norms[place] = the P-norm from the block sums, added in a fixed order; one program a tensor."""
    row = rows + COLUMNS * tl.program_id(0)
    first = tl.load(row + 3)
    blocks = (tl.load(row + 2) + BLOCK - 1) // BLOCK
    lane = tl.arange(0, WIDTH)
    if P == float("inf"):
        largest = tl.full([WIDTH], 0, tl.int64)
        for at in range(0, blocks, WIDTH):
            some = tl.load(sums + first + at + lane, mask=lane < blocks - at, other=0.0)
            largest = tl.maximum(largest, some.to(tl.int64, bitcast=True))
        norm = tl.max(largest).to(tl.float64, bitcast=True)
    else:
        total = tl.full([WIDTH], 0.0, tl.float64)
        for at in range(0, blocks, WIDTH):
            total += tl.load(sums + first + at + lane, mask=lane < blocks - at, other=0.0)
        norm = tl.sum(total)
        if P == 2.0:
            norm = tl.sqrt(norm)
        elif P != 1.0:
            norm = tl.exp2(tl.log2(norm) * tl.full([], 1.0 / P, tl.float64))
    tl.store(norms + tl.load(row + 4), norm)


@jit
def scale_blocks(
    rows: tl.tensor,
    row_of_block: tl.tensor,
    coef: tl.tensor,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """x *= coef in place, unless coef (0-d float32) is exactly 1; one program a block.

    The product is made in fp32 (float64 for float64) and rounded once.
    """
    factor = tl.load(coef)
    if DTYPE == tl.float64:
        factor = factor.to(tl.float64)
    start, begin, end = _block(rows, row_of_block, DTYPE, BLOCK)
    if factor != 1.0:  # true for NaN
        if (begin <= 0) & (end >= BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(at, (tl.load(at).to(factor.dtype) * factor).to(DTYPE))
        else:
            for piece in range(0, BLOCK, BLOCK // PIECES):
                lane = piece + tl.arange(0, BLOCK // PIECES)
                inside = (lane >= begin) & (lane < end)  # exact: a neighbour may be another tensor
                x = tl.load(start + lane, mask=inside)
                tl.store(start + lane, (x.to(factor.dtype) * factor).to(DTYPE), mask=inside)


@jit
def _block(rows: tl.tensor, row_of_block: tl.tensor, DTYPE: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Where this program's block starts, and which of its elements [begin, end) are the tensor's."""
    # A map instead of a binary search for the row: one load instead of ten that wait for each other, at 4 bytes for
    # each block of 32 KiB.
    row = rows + COLUMNS * tl.load(row_of_block + tl.program_id(0)).to(tl.int64)
    before = (tl.program_id(0) - tl.load(row + 3)) * BLOCK  # int64: a tensor may have more than 2**31 elements
    start = tl.multiple_of(tl.load(row).to(tl.pointer_type(DTYPE)) + before, 128)
    return start, tl.load(row + 1) - before, tl.load(row + 2) - before


@jit
def _part(start: tl.tensor, lane: tl.tensor, begin: tl.tensor, end: tl.tensor, RUN: tl.constexpr) -> tl.tensor:
    """The elements at ``lane`` that are inside [begin, end), and 0 for the others.

    Every aligned 16 bytes that hold one of them are read whole: 16-byte loads again, and no page is touched that the
    tensor is not on.
    """
    run = lane // RUN
    x = tl.load(start + lane, mask=(run >= begin // RUN) & (run < (end + RUN - 1) // RUN), other=0.0)
    return tl.where((lane >= begin) & (lane < end), x, 0.0)


@jit
def _quick_sum(x: tl.tensor, P: tl.constexpr, RUN: tl.constexpr) -> tl.tensor:
    """sum(|x| ** P) for P = 1, 2, 3 or max(|x|) for P = inf, of a block, as float64.

    fp32 adds the RUN neighbours of one load, float64 adds the runs: constant data are off by 7e-8 at most with runs of
    8, but by 5e-7 with one fp32 chain of 64 a thread. One operation in RUN is float64, far from what would bind.
    """
    if P == float("inf"):
        # Without the sign bit, floats order as integers do, and every NaN is above inf: max cannot lose a NaN.
        if x.dtype == tl.float64:
            result = tl.max(x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF).to(tl.float64, bitcast=True)
        else:
            bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
            result = tl.max(bits).to(tl.float32, bitcast=True).to(tl.float64)
    elif x.dtype == tl.float64:
        result = tl.sum(_power(x, P))
    else:
        power = _power(x.to(tl.float32), P)
        result = tl.sum(tl.sum(tl.reshape(power, [power.shape[0] // RUN, RUN]), axis=1).to(tl.float64))
    return result


@jit
def _exact_sum(
    start: tl.tensor, begin: tl.tensor, end: tl.tensor, P: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr
) -> tl.tensor:
    """sum(|x| ** P) of the block, every operation in float64."""
    total = tl.full([BLOCK // PIECES], 0.0, tl.float64)
    for piece in range(0, BLOCK, BLOCK // PIECES):
        x = _part(start, piece + tl.arange(0, BLOCK // PIECES), begin, end, RUN)
        total += _power(x.to(tl.float64), P)
    return tl.sum(total)


@jit
def _power(x: tl.tensor, P: tl.constexpr) -> tl.tensor:
    """|x| ** P in the dtype of ``x``; a P that is not 1, 2 or 3 needs float64."""
    power = tl.abs(x)
    if P == 2.0:
        power = x * x
    elif P == 3.0:
        power = power * power * power
    elif P != 1.0:
        power = tl.exp2(tl.log2(power) * tl.full([], P, tl.float64))  # log2(0) = -inf, exp2(-inf) = 0
    return power
