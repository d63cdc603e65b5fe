"""Layout: how many ranks hold each element of a parameter. The equation of the library stands here, once.

With ``r`` over the ranks of the clipping group and ``g`` over the gradients that rank ``r`` holds::

    total_norm ** p  =  sum_r sum_g  |local piece of g on r| ** p  /  replicas(g)

``replicas(g)`` is the number of ranks of the group that hold each element of ``g``: 1 if every element is held once,
the group's size if every rank holds all of it. For p = inf the sum is a MAX and replicas do not matter. Replicas
divide only when ranks communicate: a rank that sums alone counts what it has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate

from ..ranks.group import Axis, ClippingGroup, axis_ranks
from .piece import Held, Piece, Spec, cuts
from .refusals import (
    axes_do_not_tile,
    axis_outside,
    not_on_this_rank,
    not_positive,
    outside_the_group,
    pieces_do_not_tile,
    too_many_replicas,
    unknown_placement,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks of the clipping group hold each element of a parameter.

    ``Layout(1)``: every element is on one rank (a shard, an expert, a pipeline stage). ``Layout(group size)``: every
    rank holds all of it.

    >>> Layout(2).replicas
    2
    >>> Layout(0)
    Traceback (most recent call last):
        ...
    ValueError: replicas must be a positive whole number, got 0
    """

    replicas: int

    @classmethod
    def cut(cls, over: Sequence[Axis], *, group: dist.ProcessGroup | None = None) -> "Layout":
        """The layout of a parameter that is cut over the axes ``over`` and replicated over all others.

        * ``over``: 1-D mesh slices or process groups of this rank, such as ``[mesh["tp"]]``, along which ranks hold
          different elements; empty for a replica on every rank.
        * ``group``: the clipping group, as for :class:`Clipper`.

        ValueError if the pieces do not tile the group. No collective.
        """
        ranks = ClippingGroup.of(group).ranks
        sizes = [len(_axis_in(frozenset(ranks), axis, "over")) for axis in over]
        if len(ranks) % prod(sizes):
            raise axes_do_not_tile(sizes, prod(sizes), len(ranks))
        return cls(len(ranks) // prod(sizes))

    def __post_init__(self) -> None:
        if isinstance(self.replicas, bool) or not isinstance(self.replicas, int) or self.replicas < 1:
            raise not_positive(self.replicas)


LayoutFn: TypeAlias = Callable[[str, Tensor], Layout | None]
"""The layout of a parameter by its name; None leaves the parameter to its metadata."""

Ranks: TypeAlias = DeviceMesh | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Replication:
    """How the elements of one piece are replicated, as a plan keeps it.

    * ``replicas``: on how many ranks of the clipping group.
    * ``known_to_all``: every rank of it must know the parameter, so that they can compare it; False if `split_over` or
      `layout` said that ranks hold different ones.
    * ``by_split_over``: it was `split_over`, which applies to all parameters at once.
    * ``represents``: this rank represents the replicas of its piece, as exactly one of their ranks does.
    """

    replicas: int
    known_to_all: bool
    by_split_over: bool = False
    represents: bool = False


class LayoutReader:
    """Reads the layouts of pieces: ``layout`` wins over metadata, which wins over ``split_over``.

    One reader serves one list of pieces, which must outlive it: it knows their meshes by ``id``.
    """

    __slots__ = ("_axes", "_everyone", "_group", "_layout", "_number", "_number_of_id", "_seen")

    def __init__(self, group: ClippingGroup, split_over: Sequence[Axis], layout: LayoutFn | None) -> None:
        self._group = group
        self._everyone = frozenset(group.ranks)
        self._axes = [_axis_in(self._everyone, axis) for axis in split_over]
        self._layout = layout
        self._number: dict[Ranks, int] = {}
        self._number_of_id: dict[int, int] = {}
        self._seen: dict[tuple[int | None, tuple[Placement, ...], int], Replication] = {}

    def read(self, held: Held, index: int) -> Replication:
        """How the piece of this index is replicated; LayoutError if it is unknown, never a guess."""
        piece = held.piece
        said = None if self._layout is None else self._layout(piece.label(index), held.holder)
        if said is not None:
            if said.replicas > self._group.size:
                raise too_many_replicas(said.replicas, piece.label(index), self._group.size)
            return Replication(said.replicas, known_to_all=False)
        spec = piece.spec
        mesh, placements = (None, ()) if spec is None else (self._numbered(spec.mesh), spec.placements)
        key = mesh, placements, self._numbered(piece.flat_over)
        replication = self._seen.get(key)
        if replication is None:
            replication = self._seen[key] = self._from_metadata(piece.label(index), spec, piece.flat_over)
        return replication

    def _numbered(self, ranks: Ranks) -> int:
        """A number that equal meshes or rank lists share.

        Comparing two meshes compares all of their ranks, 0.1 ms for 16384, and FSDP2 over tensor parallel makes equal
        ones: so each object is compared once, not once per parameter.
        """
        number = self._number_of_id.get(id(ranks))
        if number is None:
            number = self._number.setdefault(ranks, len(self._number))
            self._number_of_id[id(ranks)] = number
        return number

    def _from_metadata(self, name: str, spec: Spec | None, flat_over: tuple[int, ...]) -> Replication:
        pieces = max(1, len(flat_over))
        ranks = set(flat_over)
        if spec is not None:
            pieces *= prod(_pieces_along(name, spec, axis) for axis in range(spec.mesh.ndim))
            ranks.update(spec.mesh.mesh.flatten().tolist())
        outside = sorted(ranks - self._everyone)
        if outside:
            raise outside_the_group(name, outside)
        if ranks and self._group.global_rank not in ranks:
            raise not_on_this_rank(name, len(ranks), self._group.global_rank)
        axes = [axis for axis in self._axes if not ranks.issuperset(axis)]  # the others are in its metadata
        pieces *= prod(map(len, axes))
        if self._group.size % pieces:
            raise pieces_do_not_tile(name, pieces, self._group.size)
        represents = self._represents(spec, flat_over)
        return Replication(self._group.size // pieces, not axes, by_split_over=bool(axes), represents=represents)

    def _represents(self, spec: Spec | None, flat_over: tuple[int, ...]) -> bool:
        """Whether this rank represents the replicas of such a piece.

        It does at coordinate 0 along every Replicate axis of the block that holds the group's first rank. A block is
        the ranks that metadata names; those outside of it are assumed to hold the same again, in blocks of their own.
        """
        me, first = self._group.global_rank, self._group.ranks[0]
        placed, flat = [me], set(flat_over) or {me}
        if spec is not None:
            coordinates = spec.mesh.get_coordinate()
            assert coordinates is not None, "this rank is in it"
            if any(k for k, p in zip(coordinates, spec.placements, strict=True) if not cuts(p)):
                return False
            placed = spec.mesh.mesh.flatten().tolist()
        if len(placed) * len(flat) == self._group.size:
            return True
        # Of FSDP1 over tensor parallel a rank sees its row and its column; the block is assumed to be a regular grid.
        return any(first - (rank - me) in flat for rank in placed)


def part_of(group: ClippingGroup, piece: Piece) -> tuple[int, ...]:
    """Which part of its parameter a piece is: this rank's coordinates along the axes that cut it."""
    places = [piece.flat_over.index(group.global_rank)] if piece.flat_over else []
    if piece.spec is not None:
        coordinate = piece.spec.mesh.get_coordinate() or ()
        places += [k for k, p in zip(coordinate, piece.spec.placements, strict=True) if cuts(p)]
    return tuple(places)


def _axis_in(everyone: frozenset[int], axis: Axis, argument: str = "split_over") -> tuple[int, ...]:
    ranks = axis_ranks(axis)
    if not everyone.issuperset(ranks):
        raise axis_outside(argument, ranks)
    return ranks


def _pieces_along(name: str, spec: Spec, axis: int) -> int:
    """Into how many pieces a mesh axis cuts, by its placement: [Note: a new sharding]."""
    placement = spec.placements[axis]
    if cuts(placement):
        return spec.mesh.size(axis)
    if isinstance(placement, Replicate):
        return 1
    raise unknown_placement(name, placement)
