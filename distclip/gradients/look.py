"""Gradients beside their pieces: what of each is summed, or why it cannot be."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import LayoutError
from ..kernels.dtypes import NUMBERS, WIDE
from ..layouts.piece import Piece, local_tensor, same_ranks
from . import refusals
from .local import Local, grouped_by_replicas
from .realign import cut_locally, is_candidate
from .sharing import first_shared, overlaps_itself


def look(
    pieces: Sequence[Piece],
    sources: Sequence[int],
    kinds: Sequence[tuple[int, int]],
    gradients: Sequence[Tensor | None],
    error: LayoutError | None = None,
) -> Local:
    """Look at ``gradients``, one for each source, None where there is none: piece by piece, nothing is merged.

    Never communicates. Copies only a sparse gradient that is not coalesced, and what nothing can scale in place: see
    :func:`laid_out`. The first error, from ``error`` on, is in what is returned. ``kinds``: of each piece, its replicas
    and its family.
    """
    parts: list[Tensor] = []
    indices: list[int] = []
    instead: dict[int, Tensor] = {}
    misplaced = 0
    for i, (piece, source) in enumerate(zip(pieces, sources, strict=True)):
        gradient = gradients[source]
        if gradient is None:
            continue
        try:
            found = _kept(piece, gradient)
            values = None if found is None else _values(piece, found)
        except LayoutError as problem:
            error = error or refusals.unusable(piece.label(i), problem)
            continue
        if found is None or values is None:
            misplaced += 1
            continue
        parts.append(values)
        indices.append(i)
        if found is not gradient:
            instead[source] = found
    if error is None:
        pair = first_shared(parts)
        error = None if pair is None else refusals.shared_memory(*(pieces[indices[k]].label(indices[k]) for k in pair))
    grouped, families = grouped_by_replicas(kinds[i] for i in indices)
    wide = any(part.dtype in WIDE for part in parts)
    return Local(parts, grouped, parts, None, indices, wide, misplaced, instead, error, families=families)


def _kept(piece: Piece, gradient: Tensor) -> Tensor | None:
    """``gradient``, or what takes its place to be summed and scaled; None where it must be realigned before that."""
    if isinstance(gradient, DTensor) != piece.is_dtensor:
        raise refusals.other_kind(isinstance(gradient, DTensor))
    if isinstance(gradient, DTensor):
        placed = _placed(piece, gradient)
        if placed is None:
            return None
        gradient = placed
    local = local_tensor(gradient)
    if local.is_meta:
        raise refusals.on_meta()
    if local.layout == torch.sparse_coo and local is gradient:
        return local if local.is_coalesced() else local.coalesce()
    copy = laid_out(gradient)
    return gradient if copy is None else copy


def _placed(piece: Piece, gradient: DTensor) -> DTensor | None:
    """``gradient`` in the placements of ``piece``, cut where that is enough; None where it takes communication."""
    assert piece.spec is not None
    if not same_ranks(gradient._spec.mesh, piece.spec.mesh):
        raise refusals.other_mesh(gradient._spec.mesh, piece.spec.mesh)
    if gradient._spec.placements == piece.spec.placements:
        return gradient
    cut = cut_locally(piece, gradient)
    if cut is None and not is_candidate(piece):
        raise refusals.other_placements(gradient.placements, piece.spec.placements)
    return cut


def _values(piece: Piece, gradient: Tensor) -> Tensor:
    """The local tensor of what of ``gradient`` belongs to ``piece``."""
    local = local_tensor(gradient)
    if local.layout == torch.sparse_coo and local is gradient:
        local = local._values()
    if local.layout != torch.strided:
        raise refusals.neither_strided_nor_coo(local.layout)
    if local.dtype not in NUMBERS:
        raise refusals.no_number(local.dtype)
    if piece.span is not None:
        if local.numel() != piece.shape.numel():
            raise refusals.flat_of_other_size(local.numel(), piece.shape.numel())
        return local[piece.span]
    if piece.flat_over and local.numel() != piece.here:
        raise refusals.part_of_other_size(local.numel(), piece.here)
    return local


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
