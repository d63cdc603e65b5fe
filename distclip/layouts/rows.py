"""Rows: which rows of its parameter a piece holds, on every layout. No collective.

A row is an index along dim 0 of a parameter of two dimensions or more; one of fewer is one row.

Private torch API, read in 2.13 and 2.6: ``_StridedShard.split_factor``.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..kernels.rows import Cut
from .piece import Piece, Spec, cuts
from .refusals import flattened_by_columns, not_as_placed, placed_out_of_order, placed_two_ways


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of one piece, in the order of its memory, which is row-major.

    * ``index``: (count,) int64 on the CPU, ascending: where each of them is in the whole parameter.
    * ``cut``: which elements of the piece are theirs.
    * ``total``: rows of the whole parameter.
    """

    index: Tensor
    cut: Cut
    total: int


def rows_of(piece: Piece) -> Rows:
    """The rows of which ``piece`` has elements. LayoutError where they cannot be known."""
    shape = piece.global_shape
    if piece.start is None:
        raise flattened_by_columns(piece.name)
    if len(shape) < 2:
        return _in(torch.zeros(1, dtype=torch.int64, device="cpu"), piece.start + piece.here, piece, total=1)
    index, *others = (_along(piece, dim) for dim in range(len(shape)))
    length = prod(map(len, others))
    if len(index) * length != (piece.here if piece.flattened is None else piece.flattened.numel()):
        raise not_as_placed(piece.name)
    return _in(index, length, piece, total=shape[0])


def _in(index: Tensor, length: int, piece: Piece, total: int) -> Rows:
    """The rows of ``piece``, which is a part of a tensor with rows ``index`` of ``length`` elements each."""
    assert piece.start is not None, "where it starts is known"
    if not piece.here:
        return Rows(index[:0], Cut(0, length, 0, 0), total)
    first, last = piece.start // length, (piece.start + piece.here - 1) // length
    head = min(-piece.start % length, piece.here)
    return Rows(index[first : last + 1], Cut(head, length, (piece.here - head) % length, last + 1 - first), total)


Step: TypeAlias = tuple[int, int, int]
"""One cut: the split factor of its placement, this rank's coordinate along the mesh axis, and the ranks along it."""


def _along(piece: Piece, dim: int) -> Tensor:
    """The indices along ``dim`` that this rank has, before FSDP1 cut them once more; int64, ascending."""
    index = torch.arange(piece.global_shape[dim], device="cpu")
    if piece.spec is None:
        return index
    axes = list(_axes(piece.spec, dim, piece.global_shape))
    if dim == 0 and any(bool((piece.spec.mesh.mesh.diff(dim=axis) < 0).any()) for axis in axes):
        # torch 2.13 scatters in the order of a group's ranks, which is ascending, and reads placements in the mesh's.
        raise placed_out_of_order(piece.name)
    steps = [_step(piece.spec, axis) for axis in axes]
    placed, made = _taken(index, steps), _taken(index, _as_fsdp2_cuts(steps))
    if torch.equal(placed, made):
        return placed
    if not piece.reduced:
        raise placed_two_ways(piece.name)
    return made


def _axes(spec: Spec, dim: int, shape: torch.Size) -> Iterator[int]:
    """The mesh axes along which ``dim`` is cut."""
    placements: tuple[Any, ...] = spec.placements
    return (axis for axis, p in enumerate(placements) if cuts(p) and p.dim % len(shape) == dim)


def _step(spec: Spec, axis: int) -> Step:
    coordinate = spec.mesh.get_coordinate()
    assert coordinate is not None, "this rank is in it"
    return getattr(spec.placements[axis], "split_factor", 1), coordinate[axis], spec.mesh.size(axis)


def _as_fsdp2_cuts(steps: list[Step]) -> list[Step]:
    """``steps`` in the order in which FSDP2 makes them: its own cut comes last, within what others have cut before.

    Its placement, a _StridedShard with as many blocks as the cuts to its right make, comes to the same where all cuts
    are even.
    """
    for i, (factor, k, count) in enumerate(steps):
        if 1 < factor == prod(others for _, _, others in steps[i + 1 :]):
            return [*steps[:i], *steps[i + 1 :], (1, k, count)]
    return steps


def _taken(index: Tensor, steps: Iterable[Step]) -> Tensor:
    """What is left of ``index`` for this rank, one cut after the other."""
    for factor, k, count in steps:
        blocks = (_chunk(index, j, factor) for j in range(factor))
        index = torch.cat([_chunk(block, k, count) for block in blocks])
    return index


def _chunk(index: Tensor, k: int, count: int) -> Tensor:
    """Number ``k`` of the chunks that ``torch.chunk`` makes, which leaves out empty ones."""
    size = -(-len(index) // count)
    return index[k * size : (k + 1) * size]
