"""What a part measures, in the form that the judge reads, and the float64 norms beside it."""

import os
from collections.abc import Iterable, Iterator, Sequence
from math import inf, nan
from typing import Any

import torch
from torch import Tensor

from support.oracle import true_norm

Reading = dict[str, Any]
Readings = Iterator[Reading]


def reading(kind: str, what: str, got: Any, **others: Any) -> Reading:
    return {"kind": kind, "what": what, "got": got, **others}


def right_norm(tensors: Iterable[Tensor], p: float = 2.0) -> float:
    """The norm of host tensors in float64: NaN where an element is, inf where one is infinite."""
    values = [t.to(torch.complex128).abs() if t.is_complex() else t.double() for t in tensors]
    if any(value.isnan().any() for value in values):
        return nan
    return inf if any(value.isinf().any() for value in values) else true_norm(values, p)


def name_of(dtypes: Iterable[torch.dtype]) -> str:
    """float32, bfloat16, ..., or mixed."""
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    return names.pop() if len(names) == 1 else "mixed"


def unlike(what: str, tensors: Sequence[Tensor], before: Sequence[Tensor], coef: float, near: int = 0) -> Reading:
    """How many elements are not those of ``before`` times ``coef``, multiplied in fp32 (or wider) and rounded once.

    All on the host. ``near``: so many fp32 numbers on both sides of ``coef`` may have been meant as well, all through.
    """
    factor, infinity = torch.tensor(coef), torch.tensor(inf)
    below, above = [factor], [factor]
    for _ in range(near if coef != 1.0 else 0):
        below.append(below[-1].nextafter(-infinity))
        above.append(above[-1].nextafter(infinity))
    differing = min(_differing(tensors, before, factor) for factor in [*below, *above[1:]])
    return reading("bits", what, differing, of=sum(t.numel() for t in tensors))


def _differing(tensors: Sequence[Tensor], before: Sequence[Tensor], factor: Tensor) -> int:
    return sum(int((t != _rounded(b, factor)).sum()) for t, b in zip(tensors, before, strict=True))


def _rounded(tensor: Tensor, factor: Tensor) -> Tensor:
    if tensor.dtype == torch.float64:
        return tensor * factor.double()
    wide = tensor.float() * factor
    if tensor.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":  # cuts off where a GPU rounds
        return (wide.view(torch.int32) >> 16).short().view(torch.bfloat16)
    return wide.to(tensor.dtype)
