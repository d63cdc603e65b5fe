"""Piece: one parameter as this rank holds it, whoever cut it up."""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate


@dataclass(frozen=True, slots=True)
class Spec:
    """Where a DTensor lies: its mesh, and one placement for each axis of it."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One parameter as this rank holds it.

    * ``name``: what errors call it; empty for bare tensors (see ``Plan.label``).
    * ``holder``: the tensor in whose ``.grad`` the gradient is.
    * ``size``: elements of the whole parameter, or None where this rank cannot know it.
    * ``span``: the part of a flat gradient that belongs to it; None for all of it.
    * ``spec``: DTensor placements, also where the holder is the plain local tensor of one.
    * ``flat_over``: global ranks among which the local tensor is cut once more, as FSDP1 does; empty for none.
    * ``aligned``: copies on other ranks are cut at the same places, so that they can be compared.
    * ``reduced``: whoever made the gradient has brought it to ``spec`` already, as FSDP2 does.
    """

    name: str
    holder: Tensor
    size: int | None
    span: slice | None = None
    spec: Spec | None = None
    flat_over: tuple[int, ...] = ()
    aligned: bool = True
    reduced: bool = False

    def local(self) -> Tensor:
        """This rank's values, as a plain tensor."""
        values = self.holder._local_tensor if isinstance(self.holder, DTensor) else self.holder
        return values if self.span is None else values[self.span]


def piece_of(parameter: Tensor, name: str = "", reduced: bool = False) -> Piece:
    """The piece of a parameter that is not cut by FSDP1. DDP over tensor parallel leaves ``_st_info`` (torch 2.13)."""
    if isinstance(parameter, DTensor):
        spec = Spec(parameter.device_mesh, parameter.placements)
        return Piece(name, parameter, parameter.numel(), spec=spec, reduced=reduced)
    hidden = getattr(parameter, "_st_info", None)
    if hidden is not None:
        return Piece(name, parameter, hidden.shape.numel(), spec=Spec(hidden.mesh, hidden.placements))
    return Piece(name, parameter, parameter.numel())


def piece_of_gradient(gradient: Tensor) -> Piece:
    """The piece of a gradient that is given without its parameter: a pending sum is taken for what it will be."""
    if not isinstance(gradient, DTensor):
        return Piece("", gradient, gradient.numel())
    placements = tuple(Replicate() if isinstance(p, Partial) else p for p in gradient.placements)
    return Piece("", gradient, gradient.numel(), spec=Spec(gradient.device_mesh, placements))
