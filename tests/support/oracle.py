"""The norm by another road: all gradients as one float64 vector in one process, scaled by the largest element."""

from collections.abc import Iterable, Sequence
from math import inf

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def true_norm(tensors: Iterable[Tensor], p: float = 2.0) -> float:
    """The p-norm of whole tensors, none of which is a shard, to about 1e-15."""
    vector = torch.cat([t.detach().flatten().double().abs() for t in tensors])
    largest = vector.max().item() if vector.numel() else 0.0
    if p == inf or largest == 0.0:
        return largest
    return largest * (vector / largest).pow(p).sum().item() ** (1 / p)


def rows_in(tensor: Tensor, dims: Sequence[int] | None = None) -> list[Tensor]:
    """Views of the rows of a whole tensor that is no weight of a convolution, or of those along ``dims``."""
    if tensor.ndim < 2:
        return [tensor]
    dims = ((0, 1) if tensor.ndim == 3 else (0,)) if dims is None else dims
    found = [tensor]
    for k, dim in enumerate(sorted(dims)):
        found = [each for part in found for each in part.unbind(dim - k)]
    return found


def whole_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Every gradient in full and copied: DTensors gathered, plain tensors as they are."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return [(g.full_tensor() if isinstance(g, DTensor) else g).detach().clone() for g in gradients]


def same_tensors(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two lists hold the same bits (of gradients without NaN)."""
    return len(left) == len(right) and all(map(torch.equal, left, right))
