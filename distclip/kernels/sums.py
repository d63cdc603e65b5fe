"""The p-norm of every local gradient, accumulated so that nothing overflows, underflows or is rounded away.

torch's own fp32 norm on the CPU adds a whole tensor in fp32: 1.1e-2 off at 1e8 elements (pytorch#169237). Here the
CPU adds rows of 64 squares in fp32 and the rows in float64; everything else is converted to float64 first, a chunk at
a time. x ** 2 of any finite fp32, bf16 or fp16 number is exact in float64, from 1e-45 to 3e38.
"""

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from .flat import flat_views

ROW = 64  # constant data, worst of 4000 values: 1.3e-7 off with rows of 64, 5.4e-7 with 512; 0.17 ns/element to 0.14
ROWS_CHUNK = 1 << 22  # elements summed in rows at once: 256 KiB of row norms
CHUNK = 1 << 16  # elements converted at once: 512 KiB of float64
SMALL = 1 << 14  # up to here one float64 copy in one foreach call is faster than rows
TINY = 2.5e-14  # a row norm above it lost at most 6e-8 of its sum of squares to fp32 underflow, flushed or not


def local_norms(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the p-norm of each tensor: float64, shape (len(tensors),), on their common device.

    No temporary is as large as a large tensor. Never waits on an accelerator.
    """
    norms: list[Tensor | None] = [None] * len(tensors)
    tensors = [torch.view_as_real(t) if t.is_complex() and p == 2.0 else t for t in tensors]
    batch = [i for i, t in enumerate(tensors) if t.numel() and _fits_one_call(t)]
    for i, norm in zip(batch, _foreach_norm([tensors[i] for i in batch], p), strict=True):
        norms[i] = norm
    for i, tensor in enumerate(tensors):
        if tensor.numel() and norms[i] is None:
            norms[i] = _largest(tensor) if p == inf else _large_sum(tensor, p).pow_(1 / p)
    nothing = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    return torch.stack([nothing if norm is None else norm for norm in norms])


def _fits_one_call(tensor: Tensor) -> bool:
    """Whether the foreach kernel sums it in float64 without a copy that matters; it cannot for complex numbers."""
    return not tensor.is_complex() and (tensor.device.type != "cpu" or tensor.numel() <= SMALL)


def _foreach_norm(tensors: list[Tensor], p: float) -> Sequence[Tensor]:
    return torch._foreach_norm(tensors, p, dtype=torch.float64) if tensors else ()


def _largest(tensor: Tensor) -> Tensor:
    """max(|x|): NaN when any element is."""
    if tensor.is_complex():
        parts = [_float64(chunk).max() for flat in flat_views(tensor) for chunk in torch.split(flat, CHUNK)]
        return torch.stack(parts).max()
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high).double()


def _large_sum(tensor: Tensor, p: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for flat in flat_views(tensor):
        if p == 2.0 and flat.dtype == torch.float32:
            for chunk in torch.split(flat, ROWS_CHUNK):
                total += _sum_of_rows(chunk)
        elif p == 2.0 and flat.dtype in (torch.bfloat16, torch.float16):
            for chunk in torch.split(flat, CHUNK):
                total += _sum_of_rows(chunk.float())
        else:
            for chunk in torch.split(flat, CHUNK):
                total += _exact_sum(chunk, p)
    return total


def _sum_of_rows(chunk: Tensor) -> Tensor:
    """Sum of squares of a 1-D fp32 chunk: fp32 within rows, float64 across them."""
    whole = chunk.numel() // ROW * ROW
    rows = chunk[:whole].view(-1, ROW)
    total = _exact_sum(chunk[whole:], 2.0)
    if not whole:
        return total
    norms = torch.linalg.vector_norm(rows, dim=1)
    low, high = torch.aminmax(norms)
    if low > TINY and high < inf:
        norms = norms.double()
        return total + torch.dot(norms, norms)
    return total + _sum_of_extreme_rows(rows, norms)


def _sum_of_extreme_rows(rows: Tensor, norms: Tensor) -> Tensor:
    """The same where fp32 squares of some rows over- or underflowed: those rows again in float64, zero rows not."""
    good = (norms > TINY) & (norms < inf)
    kept = norms[good].double()
    total = torch.dot(kept, kept)
    for block, bad in zip(torch.split(rows, CHUNK // ROW), torch.split(~good, CHUNK // ROW), strict=True):
        extreme = block[bad].view(-1)
        if extreme.numel() and _largest(extreme) != 0:
            total += _exact_sum(extreme, 2.0)
    return total


def _exact_sum(chunk: Tensor, p: float) -> Tensor:
    """sum(|x| ** p) of a 1-D chunk, every operation in float64."""
    x = _float64(chunk)
    return torch.dot(x, x) if p == 2.0 else x.abs().pow_(p).sum()


def _float64(chunk: Tensor) -> Tensor:
    """The numbers, or the moduli of complex ones."""
    return chunk.to(torch.complex128).abs() if chunk.is_complex() else chunk.double()
