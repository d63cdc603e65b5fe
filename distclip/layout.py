"""Layout: how many ranks hold each element of a parameter. The equation of the library stands here, once.

With ``r`` over the ranks of the clipping group and ``g`` over the gradients that rank ``r`` holds::

    total_norm ** p  =  sum_r sum_g  |local piece of g on r| ** p  /  replicas(g)

``replicas(g)`` is the number of ranks of the group that hold each element of ``g``: 1 if every element is held once,
the group's size if every rank holds all of it. For p = inf the sum is a MAX and replicas do not matter. Replicas
divide only when the ranks really talk: a rank that sums alone counts what it has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from .errors import LayoutError
from .group import Axis, ClippingGroup, axis_ranks


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

    def __post_init__(self) -> None:
        if isinstance(self.replicas, bool) or not isinstance(self.replicas, int) or self.replicas < 1:
            raise ValueError(f"replicas must be a positive whole number, got {self.replicas!r}")


LayoutFn: TypeAlias = Callable[[str, Tensor], Layout | None]
"""Says the layout of single parameters by name; None leaves the parameter to its metadata."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What the plan keeps of one parameter: its layout, and whether every rank must know the same parameter.

    ``common`` is False where `split_over` or `layout` said that ranks hold different parameters, which therefore
    cannot be compared between ranks.
    """

    layout: Layout
    common: bool


class LayoutReader:
    """Reads layouts off parameters: ``layout`` wins over DTensor metadata, which wins over ``split_over``."""

    __slots__ = ("_axes", "_group", "_layout", "_seen")

    def __init__(self, group: ClippingGroup, split_over: Sequence[Axis], layout: LayoutFn | None) -> None:
        self._group = group
        self._axes = [_axis_in(group, axis) for axis in split_over]
        self._layout = layout
        self._seen: dict[tuple[DeviceMesh, tuple[Placement, ...]], Holding] = {}

    def read(self, name: str, parameter: Tensor) -> Holding:
        """The holding of ``parameter``; LayoutError where it is unknown, never a guess."""
        said = None if self._layout is None else self._layout(name, parameter)
        if said is not None:
            if said.replicas > self._group.size:
                raise LayoutError(
                    f"layout says that {said.replicas} ranks hold {name}, but the clipping group has "
                    f"{self._group.size}: return at most Layout({self._group.size})"
                )
            return Holding(said, common=False)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            holding = self._seen.get((mesh, placements))
            if holding is None:
                holding = self._of_dtensor(name, mesh, placements)
                self._seen[mesh, placements] = holding
            return holding
        if getattr(parameter, "_fsdp_flattened", False):  # set by FSDP1 on flat and original parameters, torch 2.13
            raise LayoutError(
                f"{name} is managed by FSDP1 (FullyShardedDataParallel), which distclip does not support yet: "
                "use FSDP2 (torch.distributed.fsdp.fully_shard)"
            )
        return self._split(name, pieces=1, axes=self._axes)

    def _of_dtensor(self, name: str, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Holding:
        outside = sorted(set(mesh.mesh.flatten().tolist()) - set(self._group.ranks))
        if outside:
            raise LayoutError(
                f"{name} lives on ranks {outside} outside the clipping group: pass a `group` that holds its whole mesh"
            )
        pieces = prod(mesh.size(axis) for axis, placement in enumerate(placements) if _is_cut(name, placement))
        own = {tuple(dist.get_process_group_ranks(mesh.get_group(axis))) for axis in range(mesh.ndim)}
        return self._split(name, pieces, [ranks for ranks in self._axes if ranks not in own])

    def _split(self, name: str, pieces: int, axes: Sequence[tuple[int, ...]]) -> Holding:
        pieces *= prod(len(ranks) for ranks in axes)
        if self._group.size % pieces:
            raise LayoutError(
                f"{name} is cut into {pieces} pieces, which do not tile the {self._group.size} ranks of the clipping "
                "group: pass the `group` that these pieces live in, or say its `layout`"
            )
        return Holding(Layout(self._group.size // pieces), common=not axes)


def _axis_in(group: ClippingGroup, axis: Axis) -> tuple[int, ...]:
    ranks = axis_ranks(axis)
    if not set(ranks) <= set(group.ranks):
        raise ValueError(f"split_over names ranks {list(ranks)}, not all of which are in the clipping group")
    return ranks


def _is_cut(name: str, placement: Placement) -> bool:
    """Whether the ranks along an axis with ``placement`` hold different elements."""
    if placement.is_shard() or type(placement).__name__ == "_StridedShard":  # no Shard subclass since torch 2.10
        return True
    if isinstance(placement, Replicate):
        return False
    raise LayoutError(f"{name} is placed as {placement}, which is neither Shard nor Replicate: redistribute it first")
