"""Norms, scaling and clamping on accelerators by torch's own kernels, with few launches and no large copy.

CUDA's foreach kernels take many tensors at once if all have one dtype, are dense in memory, and the factor has that
dtype too. In any other call each tensor gets a kernel of its own, which first converts a whole copy to sum in float64,
and rounds a 0-d factor to the dtype of the tensor. No host sync. Beside the other kernels: [Note: how a norm is
summed] in kernels/__init__.py.

Private torch API, read in 2.13 (docs/explanation/cuda.md has the places): ``_foreach_norm``, ``_foreach_mul_``,
``_foreach_copy_``, ``_foreach_clamp_min_``, ``_foreach_clamp_max_``.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import inf, isinf
from typing import Any

import torch
from torch import Tensor

from .dtypes import as_real
from .flat import bounded, is_dense

SMALL = 1 << 16  # elements: a kernel on larger ones takes longer than its launch
LARGE = 1 << 22  # elements converted or joined at once: 32 MiB of float64
FEW = 3  # joining takes three launches


def norms(tensors: Sequence[Tensor], p: float) -> list[Tensor]:
    """The p-norm of each tensor: float64, 0-d, on its device."""
    real = list(map(as_real, tensors)) if p == 2 else tensors
    found: list[Tensor] = [torch.empty(0)] * len(real)
    together: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(real):
        if not tensor.numel():
            found[i] = torch.zeros((), dtype=torch.float64, device=tensor.device)
        elif p in (1, 2, inf) and not tensor.is_complex() and is_dense(tensor):
            together.setdefault(tensor.dtype, []).append(i)
        else:
            found[i] = _norm(tensor, p)
    for places in together.values():
        for i, norm in zip(places, torch._foreach_norm([real[i] for i in places], p, torch.float64), strict=True):
            found[i] = norm
    return found


def zeros(tensor: Tensor) -> Tensor:
    """How many of its elements are 0: 0-d int64. Two launches a part, which finds them in a copy of bool."""
    found = [(part == 0).sum() for part in bounded(tensor, LARGE)]
    return found[0] if len(found) == 1 else torch.stack(found).sum()


def multiply_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply every tensor in place by ``factor``, 0-d float32 or float64 on their device.

    The product is in fp32 and rounded once, for bf16 and fp16 tensors too; in float64 for float64.
    """
    for same in _alike(tensors):
        dtype = same[0].dtype
        if dtype.itemsize > 2:
            torch._foreach_mul_(same, factor.to(dtype))
            continue
        # Of one dimension it takes part in type promotion, so that the product is fp32; a 0-d one would be rounded.
        # GradScaler's kernel for many tensors does so too, but has no bf16 on CUDA (pytorch#127176).
        wide = factor.float().view(1)
        for tensor in _joined(same):
            tensor.mul_(wide)


def clamp_(tensors: Sequence[Tensor], low: Any, high: Any, unless: Tensor | None = None) -> None:
    """Clamp every tensor in place to [low, high], both numbers or both 0-d float64 on their device; NaN stays NaN.

    Bounds beyond a dtype's range become its largest numbers; inf is no bound. ``unless``: 0-d bool on their device; if
    it is true nothing changes.
    """
    for same in _alike(tensors):
        if unless is None and not isinstance(low, Tensor):
            torch._foreach_clamp_min_(same, _in_range(low, same[0].dtype))
            torch._foreach_clamp_max_(same, _in_range(high, same[0].dtype))
            continue
        floor, ceiling = _bound(low, same[0], unless, -inf), _bound(high, same[0], unless, inf)
        for tensor in _joined(same):
            tensor.clamp_(floor, ceiling)


def _bound(bound: Any, like: Tensor, unless: Tensor | None, free: float) -> Tensor:
    """``bound`` in the dtype of ``like``, or ``free`` if nothing may change."""
    number = _in_range(bound, like.dtype)
    made = number.to(like.dtype, copy=True) if isinstance(number, Tensor) else like.new_full((), number)
    return made if unless is None else made.masked_fill_(unless, free)


def _in_range(bound: Any, dtype: torch.dtype) -> Any:
    """``bound`` within the finite range of ``dtype`` if it is finite."""
    most = torch.finfo(dtype).max
    if isinstance(bound, Tensor):
        return bound if dtype.itemsize == 8 else torch.where(bound.isinf(), bound, bound.clamp(-most, most))
    return bound if isinf(bound) else min(max(bound, -most), most)


def _norm(tensor: Tensor, p: float) -> Tensor:
    """The norm of one tensor that no foreach kernel takes, part by part: torch converts a copy of what it sums."""
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    parts: list[Tensor] = [torch.linalg.vector_norm(part, p, dtype=dtype) for part in bounded(tensor, LARGE)]
    whole: Tensor = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), p)
    return whole


def _alike(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Lists of one dtype, all dense in memory or none, without empty tensors; complex ones as pairs."""
    groups: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            real = as_real(tensor)
            groups.setdefault((real.dtype, is_dense(real)), []).append(real)
    return groups.values()


def _joined(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """``tensors`` of one dtype, to be changed in place: small ones joined into copies, which are written back when the
    next is asked for.
    """
    small: list[Tensor] = []
    waiting = 0
    for tensor in tensors:
        if not tensor.is_contiguous():
            yield tensor
        elif tensor.numel() > SMALL:
            yield tensor.view(-1)
        else:
            small.append(tensor.view(-1))
            waiting += tensor.numel()
            if waiting > LARGE - SMALL:
                yield from _as_one(small)
                small, waiting = [], 0
    yield from _as_one(small)


def _as_one(tensors: list[Tensor]) -> Iterator[Tensor]:
    if len(tensors) <= FEW:
        yield from tensors
        return
    sizes = list(map(Tensor.numel, tensors))
    copy = tensors[0].new_empty(sum(sizes))
    parts = list(torch.split(copy, sizes))
    torch._foreach_copy_(parts, tensors)
    yield copy
    torch._foreach_copy_(tensors, parts)
