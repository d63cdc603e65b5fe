"""Norms and scaling on CUDA devices, in Triton: one launch for many tensors of one dtype, whatever their sizes.

Ask :func:`chosen` first: only the functions that launch kernels import Triton, on their first call. What is added in
which precision: [Note: how a norm is summed] in kernels/__init__.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import foreach
from ..dtypes import as_real
from .choice import available as available, check_choice as check_choice, chosen as chosen
from .table import Table, block_size, fits, table_of

WARPS = 8
LAUNCH = {"num_warps": WARPS, "enable_fp_fusion": True}  # as always; Triton 3.9 warns that 3.10 will fuse no a * b + c
FINISH = 2048  # block sums that one program adds at once


def local_norms(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the p-norm of each tensor: float64, shape (len(tensors),), on their common device.

    At most two launches per dtype, and a fixed order of additions: the same tensors give the same bits. Complex tensors
    (p = 2: as pairs), other dtypes and tensors with gaps go to torch's kernels, as do all in the capture of a CUDA
    graph without an earlier call with the same addresses. No host sync; the first call for a dtype and p compiles.
    """
    norms = tensors[0].new_zeros(len(tensors), dtype=torch.float64)
    parts = list(map(as_real, tensors)) if p == 2 else tensors
    groups, others = _groups(parts)
    with torch.cuda.device(norms.get_device()):  # -1 on the CPU: none
        for dtype, places in groups.items():
            table = table_of([parts[i] for i in places], places)
            if table is None:
                others += places
            else:
                _launch_sums(table, dtype, p, norms)
    if others:
        torch._foreach_copy_([norms[i] for i in others], foreach.norms([parts[i] for i in others], p))
    return norms


def scale_(tensors: Sequence[Tensor], coef: Tensor) -> None:
    """Multiply every tensor in place by ``coef``, 0-d float32 on their device, read there: if it is exactly 1 nothing
    is read or written.

    One launch per dtype. The product is in fp32 (float64 for float64) and rounded once: the same bits as
    ``foreach.multiply_``, which does the tensors that :func:`local_norms` also leaves to torch. No tensor may be listed
    twice. No host sync.
    """
    from . import device

    parts = list(map(as_real, tensors))
    groups, others = _groups(parts)
    with torch.cuda.device(coef.get_device()):
        for dtype, places in groups.items():
            table = table_of([parts[i] for i in places], places)
            if table is None:
                others += places
                continue
            device.scale_blocks[(len(table.row_of_block),)](
                table.rows, table.row_of_block, coef, _triton_dtype(dtype), block_size(dtype), **LAUNCH
            )
    if others:
        foreach.multiply_([parts[i] for i in others], coef)


def _launch_sums(table: Table, dtype: torch.dtype, p: float, norms: Tensor) -> None:
    """Write the norms of a table's tensors to their places in ``norms``."""
    from . import device

    block = block_size(dtype)
    sums = norms.new_empty(len(table.row_of_block))
    device.block_sums[(len(sums),)](
        table.rows,
        table.row_of_block,
        sums,
        _triton_dtype(dtype),
        float(p),
        block,
        16 // dtype.itemsize,
        **LAUNCH,
    )
    device.norms_of_rows[(len(table.rows),)](table.rows, sums, norms, float(p), block, FINISH, **LAUNCH)


def _groups(tensors: Sequence[Tensor]) -> tuple[dict[torch.dtype, list[int]], list[int]]:
    """Indices of the tensors that the kernels can read, by dtype, and of the others; empty ones are in neither."""
    groups: dict[torch.dtype, list[int]] = {}
    others = []
    for i, tensor in enumerate(tensors):
        if tensor.numel() and fits(tensor):
            groups.setdefault(tensor.dtype, []).append(i)
        elif tensor.numel():
            others.append(i)
    return groups, others


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))
