"""Layout: how many ranks hold each element of a parameter. The equation of the library stands here, once.

With ``r`` over the ranks of the clipping group and ``g`` over the gradients that rank ``r`` holds::

    total_norm ** p  =  sum_r sum_g  |local piece of g on r| ** p  /  replicas(g)

``replicas(g)`` is the number of ranks of the group that hold each element of ``g``: 1 if every element is held once,
the group's size if every rank holds all of it. For p = inf the sum is a MAX and replicas do not matter. Replicas
divide only when ranks communicate: a rank that sums alone counts what it has.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple, TypeAlias

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


class Along(NamedTuple):
    """An axis as this rank sees it: its global ranks, and what this rank's place along it is called, ``"pp=1"``."""

    ranks: tuple[int, ...]
    place: str


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks of the clipping group hold each element of a parameter.

    * ``replicas``: ``Layout(1)``: every element is on one rank (a shard, an expert, a pipeline stage).
      ``Layout(group size)``: every rank holds all of it.
    * ``parts``: whether ranks that hold different elements under one name hold parts of one parameter (a shard cut by
      hand, a partition of ZeRO) rather than parameters of their own (an expert, a pipeline stage). Statistics finer
      than the model's norm count parts as one; which rows they are is unknown.

    >>> Layout(2).replicas
    2
    >>> Layout(0)
    Traceback (most recent call last):
        ...
    ValueError: replicas must be a positive whole number, got 0
    """

    replicas: int
    parts: bool = field(default=False, kw_only=True)
    _over: tuple[Along, ...] | None = field(default=None, init=False, repr=False)  # of `cut`: whose ranks differ

    @classmethod
    def cut(
        cls, over: Sequence[Axis] = (), *, parts: Sequence[Axis] = (), group: dist.ProcessGroup | None = None
    ) -> "Layout":
        """The layout of a parameter that is cut over the axes ``over`` and ``parts`` and replicated over all others.

        * ``over``: 1-D mesh slices or process groups of this rank, such as ``[mesh["ep"]]``, along which ranks hold
          different parameters under one name. With ``parts`` empty as well every rank holds a replica.
        * ``parts``: those along which ranks hold parts of one parameter, such as ``[mesh["tp"]]``.
        * ``group``: the clipping group, as for :class:`Clipper`.

        ValueError if the pieces do not tile the group. No collective.
        """
        ranks = ClippingGroup.of(group).ranks
        apart = _along(frozenset(ranks), over, "over")
        sizes = [len(axis.ranks) for axis in (*apart, *_along(frozenset(ranks), parts, "parts"))]
        if len(ranks) % prod(sizes):
            raise axes_do_not_tile(sizes, prod(sizes), len(ranks))
        layout = cls(len(ranks) // prod(sizes), parts=bool(parts))
        object.__setattr__(layout, "_over", apart)
        return layout

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
    * ``where``: tells this parameter from others of its name on other ranks: ``""`` if all ranks mean the same one,
      ``"pp=1,ep=0"`` by the axes along which they differ, ``"#4"`` by the group's index of the first of the ranks that
      hold it; None if nobody said which these are.
    * ``parts``: `layout` said that ranks hold parts of it, and nobody which rows.
    """

    replicas: int
    known_to_all: bool
    by_split_over: bool = False
    represents: bool = False
    where: str | None = ""
    parts: bool = False


class LayoutReader:
    """Reads the layouts of pieces: ``layout`` wins over metadata, which wins over ``split_over``.

    One reader serves one list of pieces, which must outlive it: it knows their meshes by ``id``.
    """

    __slots__ = ("_axes", "_everyone", "_group", "_layout", "_number", "_number_of_id", "_seen")

    def __init__(self, group: ClippingGroup, split_over: Sequence[Axis], layout: LayoutFn | None) -> None:
        self._group = group
        self._everyone = frozenset(group.ranks)
        self._axes = _along(self._everyone, split_over, "split_over")
        self._layout = layout
        self._number: dict[Ranks, int] = {}
        self._number_of_id: dict[int, int] = {}
        self._seen: dict[tuple[Layout | None, int | None, tuple[Placement, ...], int], Replication] = {}

    def read(self, held: Held, index: int) -> Replication:
        """How the piece of this index is replicated; LayoutError if it is unknown, never a guess."""
        piece = held.piece
        said = None if self._layout is None else self._layout(piece.label(index), held.holder)
        if said is not None and said.replicas > self._group.size:
            raise too_many_replicas(said.replicas, piece.label(index), self._group.size)
        spec = piece.spec
        mesh, placements = (None, ()) if spec is None else (self._numbered(spec.mesh), spec.placements)
        key = said, mesh, placements, self._numbered(piece.flat_over)
        replication = self._seen.get(key)
        if replication is None:
            name, flat_over = piece.label(index), piece.flat_over
            read = self._from_metadata(name, spec, flat_over) if said is None else self._as_said(said, spec, flat_over)
            replication = self._seen[key] = read
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
        ranks = _named_in(spec, flat_over)
        if spec is not None:
            pieces *= prod(_pieces_along(name, spec, axis) for axis in range(spec.mesh.ndim))
        outside = sorted(ranks - self._everyone)
        if outside:
            raise outside_the_group(name, outside)
        if ranks and self._group.global_rank not in ranks:
            raise not_on_this_rank(name, len(ranks), self._group.global_rank)
        axes = [axis for axis in self._axes if not ranks.issuperset(axis.ranks)]  # the others are in its metadata
        pieces *= prod(len(axis.ranks) for axis in axes)
        if self._group.size % pieces:
            raise pieces_do_not_tile(name, pieces, self._group.size)
        represents = self._represents(spec, flat_over)
        return Replication(self._group.size // pieces, not axes, bool(axes), represents, _places(axes))

    def _as_said(self, said: Layout, spec: Spec | None, flat_over: tuple[int, ...]) -> Replication:
        """What `layout` said, and where that is, by what metadata says of this rank's part."""
        where: str | None = ""
        if said._over is not None:
            named = _named_in(spec, flat_over) | {self._group.global_rank}
            where = _places(axis for axis in said._over if not named.issuperset(axis.ranks))
        elif not said.parts and said.replicas < self._group.size:
            where = self._block(said.replicas, spec, flat_over)
        return Replication(said.replicas, known_to_all=False, where=where, parts=said.parts)

    def _block(self, replicas: int, spec: Spec | None, flat_over: tuple[int, ...]) -> str | None:
        """The first of the ranks that metadata names, if they are all that hold the parameter; else None.

        They are if each element is on as many of them as on all ranks. Of FSDP1 over tensor parallel a rank sees its
        row and its column of them, which are assumed to be a regular grid.
        """
        me = self._group.global_rank
        placed, copies = [me], 1
        if spec is not None:
            placed = spec.mesh.mesh.flatten().tolist()
            copies = prod(spec.mesh.size(axis) for axis, p in enumerate(spec.placements) if not cuts(p))
        first = min(placed) + min(flat_over, default=me) - me
        if copies != replicas or me not in placed or first not in self._everyone:
            return None
        return f"#{self._group.ranks.index(first)}"

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


def _along(everyone: frozenset[int], axes: Sequence[Axis], argument: str) -> tuple[Along, ...]:
    """Mesh slices and process groups, the argument of this name, as this rank sees them."""
    found = []
    for k, axis in enumerate(axes):
        ranks = axis_ranks(axis)
        if not everyone.issuperset(ranks):
            raise axis_outside(argument, ranks)
        names = axis.mesh_dim_names if isinstance(axis, DeviceMesh) else None
        name = names[0] if names else f"axis{k}"
        found.append(Along(ranks, f"{name}={ranks.index(dist.get_rank())}"))
    return tuple(found)


def _places(axes: Iterable[Along]) -> str:
    return ",".join(axis.place for axis in axes)


def _named_in(spec: Spec | None, flat_over: tuple[int, ...]) -> set[int]:
    """The global ranks that the metadata of a piece names."""
    return {*flat_over, *([] if spec is None else spec.mesh.mesh.flatten().tolist())}


def _pieces_along(name: str, spec: Spec, axis: int) -> int:
    """Into how many pieces a mesh axis cuts, by its placement: [Note: a new sharding]."""
    placement = spec.placements[axis]
    if cuts(placement):
        return spec.mesh.size(axis)
    if isinstance(placement, Replicate):
        return 1
    raise unknown_placement(name, placement)
