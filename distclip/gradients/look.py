"""One gradient beside its piece: what of it is summed, or why it cannot be."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import LayoutError
from ..layouts.piece import Piece, local_tensor, same_ranks
from .realign import cut_locally, is_candidate
from .sharing import overlaps_itself

REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)
NUMBERS = frozenset(REAL + COMPLEX)


@dataclass(slots=True)
class Found:
    """``values``: the local tensor to sum and scale, None if that takes realigning first or if there is a ``problem``.

    ``instead``: a gradient that takes the place of the one found, to be stored where that was.
    """

    values: Tensor | None
    instead: Tensor | None = None
    problem: str | None = None


def look_at(piece: Piece, gradient: Tensor) -> Found:
    """Look at the gradient of one piece; never talks.

    Copies only a sparse gradient that is not coalesced, and what nothing can scale in place: see :func:`laid_out`.
    """
    instead: Tensor | None = None
    if isinstance(gradient, DTensor) != piece.is_dtensor:
        kinds = ["a plain tensor", "a DTensor"]
        kind = kinds[isinstance(gradient, DTensor)], kinds[piece.is_dtensor]
        return Found(None, problem=f"is {kind[0]}, its parameter {kind[1]}: give both the same kind")
    if isinstance(gradient, DTensor):
        assert piece.spec is not None
        if not same_ranks(gradient._spec.mesh, piece.spec.mesh):
            return Found(
                None,
                problem=f"lies on {gradient._spec.mesh}, its parameter on {piece.spec.mesh}: redistribute the gradient "
                "to the parameter's mesh and placements",
            )
        if gradient._spec.placements != piece.spec.placements:
            instead = cut_locally(piece, gradient)
            if instead is None and is_candidate(piece):
                return Found(None)
            if instead is None:
                return Found(
                    None,
                    problem=f"is placed as {gradient.placements}, its parameter as {piece.spec.placements}: "
                    "redistribute the gradient to the parameter's placements",
                )
            gradient = instead
    local = local_tensor(gradient)
    if local.is_meta:
        return Found(None, problem="is on the meta device, where it has no values: move the model with to_empty()")
    if local.layout == torch.sparse_coo and not isinstance(gradient, DTensor):
        instead = None if local.is_coalesced() else local.coalesce()
        local = (local if instead is None else instead)._values()
    elif (copy := laid_out(gradient)) is not None:
        instead, local = copy, local_tensor(copy)
    elif local.layout != torch.strided:
        return Found(None, problem=f"has layout {local.layout}, which is not supported: use strided or sparse_coo")
    if local.dtype not in NUMBERS:
        return Found(None, problem=f"has dtype {local.dtype}, which has no norm: use {', '.join(map(str, REAL))}")
    if piece.span is not None:
        if local.numel() != piece.shape.numel():
            return Found(
                None,
                problem=f"lies in a flat gradient of {local.numel()} elements beside a flat parameter of "
                f"{piece.shape.numel()}: it is not reduced yet (leave no_sync for the last backward)",
            )
        local = local[piece.span]
    elif piece.flat_over and local.numel() != piece.here:
        return Found(
            None,
            problem=f"has {local.numel()} elements where this rank's part of its parameter has {piece.here}: it is not "
            "reduced yet (leave no_sync for the last backward)",
        )
    return Found(local, instead)


def laid_out(gradient: Tensor) -> Tensor | None:
    """A copy of a strided ``gradient`` whose elements do not lie in memory one by one; None where they do.

    As in what ``torch.autograd.grad(w.sum(), w)`` returns, which is expanded, or where it is the conjugate or the
    negative of what lies in memory (``w.conj()`` gives ``w`` such a gradient).
    """
    local = local_tensor(gradient)
    if local.layout != torch.strided:
        return None
    if not (local.is_conj() or local.is_neg() or (not local.is_contiguous() and overlaps_itself(local))):
        return None
    copy = local.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    if not isinstance(gradient, DTensor):
        return copy
    where, shape, stride = gradient._spec, gradient.shape, gradient.stride()
    return DTensor.from_local(copy, where.mesh, where.placements, run_check=False, shape=shape, stride=stride)


@dataclass(frozen=True, slots=True)
class Local:
    """This rank's gradients, piece by piece.

    * ``parts``: those that exist and are in place, as plain tensors; ``indices``: which piece each belongs to.
    * ``misplaced``: how many gradients wait to be realigned.
    * ``instead``: gradients to be stored in place of those found, by source.
    * ``error``: what makes these gradients unusable on this rank, to be raised once all ranks have met.
    """

    parts: list[Tensor]
    indices: list[int]
    misplaced: int
    instead: dict[int, Tensor]
    error: LayoutError | None
