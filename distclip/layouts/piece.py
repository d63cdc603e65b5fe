"""Piece: one parameter as this rank holds it, whoever cut it up.

What a piece and a holder are: [Note: pieces] in plan/__init__.py. Private torch API, read in 2.13 and 2.6:
``_local_tensor``.

Nothing here changes once it is made. Frozen dataclasses would say so, and take three times as long to make.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Self

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate


@dataclass(slots=True)
class Spec:
    """Where a DTensor lies: its mesh, and one placement per mesh axis."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]


@dataclass(slots=True)
class Piece:
    """What is known of one parameter, or of one gradient, without keeping the tensor.

    * ``name``: what errors call it; empty for bare tensors (see :meth:`label`).
    * ``shape``, ``dtype``, ``device``: of the holder, the tensor in whose ``.grad`` the gradient is.
    * ``is_dtensor``: whether the holder is one.
    * ``here``: elements of the piece on this rank.
    * ``global_shape``: of the whole parameter, whoever cut it.
    * ``span``: the part of a flat gradient that belongs to it; None for all of it.
    * ``spec``: DTensor placements, also if the holder is the plain local tensor of one.
    * ``flat_over``: global ranks among which the local tensor is cut once more, as FSDP1 does; empty for none.
    * ``flattened``: the shape of that local tensor, before FSDP1 made it flat; None for none.
    * ``start``: the element of it, in the order in which it was flattened, with which this piece begins; ``strides``:
      those of its dimensions in that order, empty where it is row by row.
    * ``row_dims``: the dimensions that number outputs of its layer, ascending; (0,) where no layer is known.
    * ``aligned``: replicas on other ranks are cut at the same places, so that they can be compared.
    * ``reduced``: the gradient comes already in the placements of ``spec``, as FSDP2 makes it.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    is_dtensor: bool
    here: int
    global_shape: torch.Size
    span: slice | None = None
    spec: Spec | None = None
    flat_over: tuple[int, ...] = ()
    flattened: torch.Size | None = None
    start: int = 0
    strides: tuple[int, ...] = ()
    row_dims: tuple[int, ...] = (0,)
    aligned: bool = True
    reduced: bool = False

    @property
    def size(self) -> int:
        """Elements of the whole parameter."""
        return self.global_shape.numel()

    def label(self, index: int) -> str:
        """What errors call it; ``index`` is its place in its list."""
        return self.name or f"parameter {index} of shape {tuple(self.shape)}"


@dataclass(slots=True)
class Held:
    """A piece and its holder. Plans keep the piece alone, so that they keep no model alive."""

    piece: Piece
    holder: Tensor

    @classmethod
    def whole(
        cls,
        holder: Tensor,
        name: str,
        global_shape: torch.Size,
        spec: Spec | None = None,
        reduced: bool = False,
        row_dims: tuple[int, ...] = (0,),
    ) -> Self:
        """All that ``holder`` has on this rank is one piece."""
        piece = Piece(
            name=name,
            shape=holder.shape,
            dtype=holder.dtype,
            device=holder.device,
            is_dtensor=isinstance(holder, DTensor),
            here=local_tensor(holder).numel(),
            global_shape=global_shape,
            spec=spec,
            reduced=reduced,
            row_dims=row_dims,
        )
        return cls(piece, holder)

    def values(self) -> Tensor:
        """This rank's values, as a plain tensor."""
        values = local_tensor(self.holder)
        return values if self.piece.span is None else values[self.piece.span]


def held_parameter(parameter: Tensor, name: str = "", reduced: bool = False, row_dims: tuple[int, ...] = (0,)) -> Held:
    """A parameter that is not cut by FSDP1. DDP over tensor parallel leaves ``_st_info`` (torch 2.13).

    [Note: a new sharding] in layouts/__init__.py.
    """
    if isinstance(parameter, DTensor):
        spec = Spec(parameter.device_mesh, parameter.placements)
        return Held.whole(parameter, name, parameter.shape, spec, reduced, row_dims)
    hidden = getattr(parameter, "_st_info", None)
    if hidden is not None:
        spec = Spec(hidden.mesh, hidden.placements)
        return Held.whole(parameter, name, hidden.shape, spec, row_dims=row_dims)
    return Held.whole(parameter, name, parameter.shape, row_dims=row_dims)


def held_gradient(gradient: Tensor) -> Held:
    """A gradient given without its parameter; a Partial one counts as Replicate, which it will be.

    [Note: a new sharding] in layouts/__init__.py.
    """
    if not isinstance(gradient, DTensor):
        return Held.whole(gradient, "", gradient.shape)
    placements = tuple(Replicate() if isinstance(p, Partial) else p for p in gradient.placements)
    return Held.whole(gradient, "", gradient.shape, Spec(gradient.device_mesh, placements))


def once(listed: Iterable[Held]) -> list[Held]:
    """``listed`` without repetitions: a parameter listed twice counts once."""
    unique: dict[tuple[int, str | None], Held] = {}
    for item in listed:
        unique.setdefault((id(item.holder), None if item.piece.span is None else item.piece.name), item)
    return list(unique.values())


def holders_of(listed: Iterable[Held]) -> list[Tensor]:
    """The holders of these pieces, each once: a flat one holds many pieces."""
    return list({id(item.holder): item.holder for item in listed}.values())


def same_ranks(mesh: DeviceMesh, other: DeviceMesh) -> bool:
    """Whether both lay the same ranks out in the same way, whatever their axes are called."""
    return mesh is other or torch.equal(mesh.mesh, other.mesh)


def cuts(placement: Placement) -> bool:
    """Whether the ranks along a mesh axis with ``placement`` hold different elements: [Note: a new sharding]."""
    return placement.is_shard() or type(placement).__name__ == "_StridedShard"  # no Shard subclass since torch 2.10


local_of = attrgetter("_local_tensor")  # of a DTensor


def local_tensor(tensor: Tensor) -> Tensor:
    """A DTensor's local tensor, or the tensor itself. ``to_local()`` takes 3.6 us, the attribute 10 ns."""
    local: Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local
