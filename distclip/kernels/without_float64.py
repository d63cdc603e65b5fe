"""Norms on devices without float64 (MPS, some XPU): the device adds 64 squares in fp32, the host adds these sums.

Rows of 64 have the same error as on the CPU (:mod:`.sums`): at most 1.5e-7 on constant data. A tensor with a row
outside the range of fp32 is copied to the host and summed there, as is every tensor if p is neither 2 nor inf. Beside
the other kernels: [Note: how a norm is summed] in kernels/__init__.py.
"""

from collections.abc import Sequence
from math import inf, isfinite

import torch
from torch import Tensor

from .flat import flat_views
from .sums import LEAST, ROW, largest, power_sum

CHUNK = 1 << 22  # elements converted to fp32 at once: 16 MiB


def norms_on_host(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the p-norm of each tensor: float64, shape (len(tensors),), on the CPU; syncs with their device.

    One fp32 number per 64 elements (p = inf: per tensor) is copied, in one copy.
    """
    rows = [_rows(tensor, p) for tensor in tensors]
    counts = list(map(len, rows))
    values = torch.cat(rows).cpu().double() if rows else torch.zeros(0, dtype=torch.float64)
    found = [_norm(few, t, p) for few, t in zip(torch.split(values, counts), tensors, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def _rows(tensor: Tensor, p: float) -> Tensor:
    """fp32, 1-D: the norms of rows that hold each element of ``tensor`` once; none if the host must read them all."""
    if not tensor.numel() or p not in (2, inf) or tensor.is_complex():
        return tensor.new_zeros(0, dtype=torch.float32)
    if p == inf:
        largest_one: Tensor = torch.linalg.vector_norm(tensor, inf)
        return largest_one.float().view(1)
    found = []
    for flat in flat_views(tensor):
        for chunk in torch.split(flat, CHUNK):
            whole = len(chunk) // ROW * ROW
            found.append(torch.linalg.vector_norm(chunk[:whole].float().view(-1, ROW), 2, 1))
            found.append(torch.linalg.vector_norm(chunk[whole:].float(), 2).view(1))
    return torch.cat(found)


def _norm(rows: Tensor, tensor: Tensor, p: float) -> float:
    """The norm of ``tensor`` from those of its rows, or from all of its elements if a row is out of range."""
    if p == inf:
        return rows.item() if len(rows) else largest([tensor.cpu()])
    total = rows.dot(rows).item()
    if not len(rows) * LEAST < total or not isfinite(total):  # true for NaN and without rows
        zeros = not tensor.numel() or not torch.linalg.vector_norm(tensor, inf)  # would be copied for nothing
        total = 0.0 if zeros else power_sum([tensor.cpu()], p)
    return torch.tensor(total, dtype=torch.float64).pow(1 / p).item()
