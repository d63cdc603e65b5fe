"""The code that runs on the device: three kernels over a table of tensors. Importing this file imports Triton.

A block is ``block`` neighbouring elements in memory, the work of one program. Blocks start at cache lines, not at the
tensor, so a full block is read in 16-byte loads wherever the tensor starts; only a tensor's first and last block may be
partial. A row of the table has the place of a tensor in memory (:mod:`.table`).
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

COLUMNS = tl.constexpr(5)  # int64: address of a cache line, begin, end (elements from there), first block, place
PIECES = tl.constexpr(8)  # where speed does not count, a block goes in so many turns: fewer registers, less code

TINY = tl.constexpr(1e-26)  # a block's fp32 sum above it lost at most 16384 * 2**-126 / TINY = 2e-8 to underflow


# One kernel for arguments of any alignment: it changes no load that counts, and nothing may be compiled in the middle
# of a run, or of a capture, because a table has an odd number of rows.
ARGUMENTS = ("rows", "row_of_block", "sums", "norms", "coef")


def jit(function: Callable[..., object]) -> Any:
    """triton.jit with a type that mypy can see."""
    return triton.jit(function, do_not_specialize_on_alignment=ARGUMENTS)


@jit
def block_sums(
    rows: tl.tensor,
    row_of_block: tl.tensor,
    sums: tl.tensor,
    dtype: tl.constexpr,
    p: tl.constexpr,
    block: tl.constexpr,
    run: tl.constexpr,
) -> None:
    """One slot of ``sums`` = sum(|x| ** p) over a block, or max(|x|) for p = inf; one program per block.

    ``sums``: float64, a slot per block, so that their order cannot change a bit. ``run``: elements in 16 bytes.
    """
    start, begin, end = _block(rows, row_of_block, dtype, block)
    tl.store(sums + tl.program_id(0), _sum(start, begin, end, p, block, run))


@jit
def norms_of_rows(
    rows: tl.tensor,
    sums: tl.tensor,
    norms: tl.tensor,
    p: tl.constexpr,
    block: tl.constexpr,
    width: tl.constexpr,
) -> None:
    """norms[place] = the p-norm from the block sums, added in a fixed order; one program per tensor."""
    row = rows + COLUMNS * tl.program_id(0)
    tl.store(norms + tl.load(row + 4), _norm(row, sums, p, block, width))


@jit
def _norm(row: tl.tensor, sums: tl.tensor, p: tl.constexpr, block: tl.constexpr, width: tl.constexpr) -> tl.tensor:
    first = tl.load(row + 3)
    blocks = (tl.load(row + 2) + block - 1) // block
    lane = tl.arange(0, width)
    if p == float("inf"):
        largest = tl.full([width], 0, tl.int64)
        for at in range(0, blocks, width):
            some = tl.load(sums + first + at + lane, mask=lane < blocks - at, other=0.0)
            largest = tl.maximum(largest, _bits(some))
        norm = _largest(largest.to(tl.float64, bitcast=True))
    else:
        total = tl.full([width], 0.0, tl.float64)
        for at in range(0, blocks, width):
            total += tl.load(sums + first + at + lane, mask=lane < blocks - at, other=0.0)
        norm = tl.sum(total)
        if p == 2.0:
            norm = tl.sqrt(norm)
        elif p != 1.0:
            norm = tl.exp2(tl.log2(norm) * tl.full([], 1.0 / p, tl.float64))
    return norm


@jit
def scale_blocks(
    rows: tl.tensor,
    row_of_block: tl.tensor,
    coef: tl.tensor,
    dtype: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """x *= coef in place, unless coef (0-d float32) is exactly 1; one program per block.

    The product is in fp32 (float64 for float64) and rounded once.
    """
    factor = tl.load(coef)
    if dtype == tl.float64:
        factor = factor.to(tl.float64)
    start, begin, end = _block(rows, row_of_block, dtype, block)
    if factor != 1.0:  # true for NaN
        if (begin <= 0) & (end >= block):
            at = start + tl.arange(0, block)
            tl.store(at, (tl.load(at).to(factor.dtype) * factor).to(dtype))
        else:
            for piece in range(0, block, block // PIECES):
                lane = piece + tl.arange(0, block // PIECES)
                inside = (lane >= begin) & (lane < end)  # exact: a neighbour may be another tensor
                x = tl.load(start + lane, mask=inside)
                tl.store(start + lane, (x.to(factor.dtype) * factor).to(dtype), mask=inside)


@jit
def _block(rows: tl.tensor, row_of_block: tl.tensor, dtype: tl.constexpr, block: tl.constexpr) -> tl.tensor:
    """Where this program's block starts, and which of its elements [begin, end) belong to the tensor."""
    # A map instead of a binary search for the row: one load instead of ten that wait for each other, at 4 bytes for
    # each block of 32 KiB.
    row = rows + COLUMNS * tl.load(row_of_block + tl.program_id(0)).to(tl.int64)
    before = (tl.program_id(0) - tl.load(row + 3)) * block  # int64: a tensor may have more than 2**31 elements
    start = tl.multiple_of(tl.load(row).to(tl.pointer_type(dtype)) + before, 128)
    return start, tl.load(row + 1) - before, tl.load(row + 2) - before


@jit
def _sum(
    start: tl.tensor, begin: tl.tensor, end: tl.tensor, p: tl.constexpr, block: tl.constexpr, run: tl.constexpr
) -> tl.tensor:
    """sum(|x| ** p) or max(|x|) over the elements [begin, end) of a block, as float64."""
    dtype: tl.constexpr = start.dtype.element_ty
    result = tl.full([], 0.0, tl.float64)
    done = False
    if (p == 1.0) | (p == 2.0) | (p == 3.0) | (p == float("inf")):  # noqa: SIM102 - this is decided when compiling, the next not
        if (begin <= 0) & (end >= block):
            result = _quick_sum(tl.load(start + tl.arange(0, block)), p, run)
            # Not so for zeros, underflow, overflow and NaN. In float64 and for inf a second sum would change nothing.
            done = (dtype == tl.float64) | (p == float("inf")) | ((result > TINY) & (result < float("inf")))
    if not done:
        result = _exact_sum(start, begin, end, p, block, run)
    return result


@jit
def _quick_sum(x: tl.tensor, p: tl.constexpr, run: tl.constexpr) -> tl.tensor:
    """sum(|x| ** p) for p = 1, 2, 3 or max(|x|) for p = inf, of a block, as float64.

    fp32 adds the ``run`` neighbours of one load, float64 adds the runs: constant data are off by at most 7e-8 with runs
    of 8, but by 5e-7 with one fp32 chain of 64 per thread. One addition in ``run`` is float64.
    """
    if p == float("inf"):
        result = _largest(x)
    elif x.dtype == tl.float64:
        result = tl.sum(_power(x, p))
    else:
        power = _power(x.to(tl.float32), p)
        result = tl.sum(tl.sum(tl.reshape(power, [power.shape[0] // run, run]), axis=1).to(tl.float64))
    return result


@jit
def _exact_sum(
    start: tl.tensor, begin: tl.tensor, end: tl.tensor, p: tl.constexpr, block: tl.constexpr, run: tl.constexpr
) -> tl.tensor:
    """The same for any p and for the elements [begin, end) of a block, every operation in float64, piece by piece."""
    total = tl.full([block // PIECES], 0.0, tl.float64)
    for piece in range(0, tl.minimum(end, block).to(tl.int32), block // PIECES):
        lane = piece + tl.arange(0, block // PIECES)
        # Every aligned 16 bytes with an element of the tensor in them are read whole: 16-byte loads here too, and no
        # page that the tensor is not on.
        word = lane // run
        x = tl.load(start + lane, mask=(word >= begin // run) & (word < (end + run - 1) // run), other=0.0)
        x = tl.where((lane >= begin) & (lane < end), x, 0.0).to(tl.float64)
        if p == float("inf"):
            total = tl.maximum(total.to(tl.int64, bitcast=True), _bits(x)).to(tl.float64, bitcast=True)
        else:
            total += _power(x, p)
    return _largest(total) if p == float("inf") else tl.sum(total)


@jit
def _bits(x: tl.tensor) -> tl.tensor:
    """|x| as an integer in the same order, where every NaN is above inf, so that no max loses a NaN."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits


@jit
def _largest(x: tl.tensor) -> tl.tensor:
    """max(|x|), NaN if any element is, as float64."""
    bits = tl.max(_bits(x))
    if x.dtype == tl.float64:
        largest = bits.to(tl.float64, bitcast=True)
    else:
        largest = bits.to(tl.float32, bitcast=True).to(tl.float64)
    return largest


@jit
def _power(x: tl.tensor, p: tl.constexpr) -> tl.tensor:
    """|x| ** p in the dtype of ``x``; a p that is not 1, 2 or 3 needs float64."""
    power = tl.abs(x)
    if p == 2.0:
        power = x * x
    elif p == 3.0:
        power = power * power * power
    elif p != 1.0:
        power = tl.exp2(tl.log2(power) * tl.full([], p, tl.float64))  # log2(0) = -inf, exp2(-inf) = 0
    return power
