"""Rows: which rows of its parameter a piece holds, on every layout. No collective.

A row is an index along some dimensions, the *row dims*, of a parameter of two dimensions or more; one of fewer is one
row. Rows are numbered by these indices, that of the last dimension counting fastest.

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
from .refusals import (
    flattened_across_rows,
    flattened_in_another_order,
    no_such_dim,
    not_as_placed,
    placed_out_of_order,
    placed_two_ways,
)

Grid: TypeAlias = tuple[tuple[int, int], ...]
"""Row dims, ascending, and their sizes."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of one piece, in row-major order once its row dims are the first.

    * ``index``: (count,) int64 on the CPU, ascending: where each of them is in the whole parameter.
    * ``cut``: which elements of the piece are theirs.
    * ``grid``: the row dims of the whole parameter and their sizes; empty where it is one row.
    """

    index: Tensor
    cut: Cut
    grid: Grid

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(dim for dim, _ in self.grid)


def rows_of(piece: Piece, dims: tuple[int, ...] | None = None) -> Rows:
    """The rows of which ``piece`` has elements. LayoutError where they cannot be known.

    ``dims``: the row dims, ascending; None for those of outputs. ValueError for one that the parameter has not.
    """
    shape = piece.global_shape
    dims = piece.row_dims if dims is None else dims
    if len(shape) < 2 or not dims:
        here = min(piece.here, 1)
        return Rows(torch.zeros(here, dtype=torch.int64, device="cpu"), Cut(0, piece.here, 0, here), ())
    if dims[-1] >= len(shape):
        raise no_such_dim(piece.name, tuple(shape), dims)
    if piece.flattened is not None and not are_first(dims):
        raise flattened_across_rows(piece.name, dims)
    if piece.flattened is not None and len(dims) > _in_order(piece):
        raise flattened_in_another_order(piece.name)
    ours = [along(piece, dim, of_rows=dim in dims) for dim in range(len(shape))]
    index = torch.zeros(1, dtype=torch.int64, device="cpu")
    for dim in dims:
        index = (index.view(-1, 1) * shape[dim] + ours[dim]).flatten()
    length = prod(len(each) for dim, each in enumerate(ours) if dim not in dims)
    if len(index) * length != (piece.here if piece.flattened is None else piece.flattened.numel()):
        raise not_as_placed(piece.name)
    return _in(index, length, piece, tuple((dim, shape[dim]) for dim in dims))


def _in_order(piece: Piece) -> int:
    """How many first dimensions are row-major in a part that FSDP1 has flattened as it was in memory."""
    assert piece.flattened is not None
    sizes = list(enumerate(piece.flattened))
    after = [piece.flattened[dim + 1 :].numel() for dim, _ in sizes]
    strides = piece.strides or after
    return next((dim for dim, size in sizes if strides[dim] != after[dim] and size > 1), len(sizes))


def are_first(dims: tuple[int, ...]) -> bool:
    """Whether these are the first dimensions, so that rows are neighbours in row-major order."""
    return dims == tuple(range(len(dims)))


def _in(index: Tensor, length: int, piece: Piece, grid: Grid) -> Rows:
    """The rows of ``piece``, which is a part of a tensor with rows ``index`` of ``length`` elements each."""
    if not piece.here:
        return Rows(index[:0], Cut(0, length, 0, 0), grid)
    first, last = piece.start // length, (piece.start + piece.here - 1) // length
    head = min(-piece.start % length, piece.here)
    return Rows(index[first : last + 1], Cut(head, length, (piece.here - head) % length, last + 1 - first), grid)


Step: TypeAlias = tuple[int, int, int]
"""One cut: the split factor of its placement, this rank's coordinate along the mesh axis, and the ranks along it."""


def along(piece: Piece, dim: int, of_rows: bool) -> Tensor:
    """The indices along ``dim`` that this rank has, before FSDP1 cut them once more; int64, ascending.

    ``of_rows``: it matters which, and not only how many.
    """
    index = torch.arange(piece.global_shape[dim], device="cpu")
    if piece.spec is None:
        return index
    axes = list(_axes(piece.spec, dim, piece.global_shape))
    if of_rows and any(bool((piece.spec.mesh.mesh.diff(dim=axis) < 0).any()) for axis in axes):
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
