"""Places: where in its whole parameter each element of a piece is, on every layout. No collective."""

from collections.abc import Sequence
from math import gcd, prod

import torch
from torch import Tensor

from ..kernels.fingerprint import Place
from .piece import Piece
from .refusals import not_as_placed
from .rows import along


def place_of(piece: Piece, order: Sequence[int] | None = None) -> Place:
    """Where the elements of ``piece`` are, in the order of memory. LayoutError where it cannot be known.

    ``order``: the dimensions as they count there, `kernels.fingerprint.order_of` of the gradient; None where the last
    one counts fastest. What FSDP1 has flattened has its own.
    """
    shape = piece.global_shape
    if piece.strides:
        order = sorted(range(len(shape)), key=piece.strides.__getitem__, reverse=True)
    elif piece.flattened is not None or order is None:
        order = range(len(shape))
    ours = [along(piece, dim, of_rows=True) for dim in order]
    if prod(map(len, ours)) != (piece.here if piece.flattened is None else piece.flattened.numel()):
        raise not_as_placed(piece.name)
    starts, length, step = torch.zeros(1, dtype=torch.int64, device="cpu"), 1, 1
    for index, dim in zip(reversed(ours), reversed(order), strict=True):
        apart = shape[dim + 1 :].numel()
        together = 1
        if len(starts) == 1 and (length == 1 or apart == length * step):  # neighbours along this dim go on with the run
            together = _stretch(index)
            step = apart if length == 1 else step
        length *= together
        starts = (index[::together].view(-1, 1) * apart + starts).flatten()
    return Place(starts, length, step, piece.start)


def _stretch(index: Tensor) -> int:
    """Into what equal stretches of consecutive numbers ``index``, ascending, falls; the longest such."""
    ends = (index.diff() != 1).nonzero().flatten() + 1
    return max(1, gcd(*ends.tolist(), len(index)))
