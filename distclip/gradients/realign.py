"""Bringing gradients to their parameters' placements before they are summed.

Sequence-parallel norm layers leave Partial gradients, a row-wise embedding leaves a Replicate gradient for a Shard
parameter. A Replicate gradient is cut locally. Everything else takes the ranks of the parameter's mesh, and
whether it is needed cannot be read from the parameter: so the ranks of each mesh first agree on one number for each
candidate, and a rank whose gradient is missing takes part with zeros.

Private torch API, read in 2.13: ``compute_local_shape_and_global_offset``.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..errors import LayoutError
from ..layouts.piece import Piece, cuts, same_ranks
from . import refusals

BASE = 64  # codes for a placement along one axis; 63 bits of an int64 hold 10 axes
NONE, IN_PLACE = 0, 1  # whole codes: no gradient, and one that lies as its parameter, whatever its placements are
NOTHING_LOWER = -(1 << 63) + 1
UNKNOWN = BASE - 1
SUMS = ("sum", "avg")


def is_candidate(piece: Piece) -> bool:
    """Whether the gradient of ``piece`` may come in placements that only communication can change."""
    return piece.spec is not None and piece.is_dtensor and not piece.reduced and piece.spec.mesh.size() > 1


def cut_locally(piece: Piece, gradient: DTensor) -> DTensor | None:
    """``gradient`` in the placements of ``piece`` if cutting copies is enough, else None: [Note: a new sharding]."""
    assert piece.spec is not None
    pairs = list(zip(gradient.placements, piece.spec.placements, strict=True))
    if all(here == there or (isinstance(here, Replicate) and type(there) is Shard) for here, there in pairs):
        return gradient.redistribute(placements=piece.spec.placements)
    return None


def realign(pieces: Sequence[Piece], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """All ``gradients`` in the placements of their ``pieces``.

    Every rank of the group calls. The ranks of each mesh with candidates make one all-reduce along each of its axes,
    then redistribute what one of them found out of place. Waits. LayoutError on all ranks of the mesh where they hold
    one gradient in different placements, or where torch would redistribute it wrongly, once the other meshes are done.
    """
    result = list(gradients)
    by_mesh: dict[DeviceMesh, list[int]] = {}
    for i, piece in enumerate(pieces):
        if is_candidate(piece):
            assert piece.spec is not None
            by_mesh.setdefault(piece.spec.mesh, []).append(i)
    error: LayoutError | None = None
    for mesh, indices in by_mesh.items():
        codes = [_code(pieces[i], gradients[i]) for i in indices]
        try:
            agreed = _agreed(mesh, codes)
        except LayoutError as found:  # of this mesh: its ranks may be awaited in the next
            error = error or found
            continue
        for i, placements in zip(indices, agreed, strict=True):
            spec = pieces[i].spec
            assert spec is not None
            if placements is not None and _is_cut_out_of_order(mesh, placements, spec.placements):
                error = error or refusals.out_of_order(mesh)
            elif placements is not None:
                gradient = result[i]
                source = _zeros(pieces[i], mesh, placements) if gradient is None else gradient
                assert isinstance(source, DTensor)
                result[i] = source.redistribute(placements=spec.placements)
    if error is not None:
        raise error
    return result


def _is_cut_out_of_order(mesh: DeviceMesh, placements: Sequence[Placement], wanted: Sequence[Placement]) -> bool:
    """Whether parts would have to be made, or put together, along an axis whose ranks are not in ascending order.

    torch 2.13 does so in the order of a group's ranks, which is ascending, and takes the parts for those of the mesh's
    order: gradients in the wrong places, and where parts differ in size elements that are lost. Copies are cut rightly.
    """
    pairs = enumerate(zip(placements, wanted, strict=True))
    moved = [axis for axis, (here, there) in pairs if here != there and not isinstance(here, Replicate)]
    parted = (axis for axis in moved if cuts(placements[axis]) or cuts(wanted[axis]))
    return any(bool((mesh.mesh.diff(dim=axis) < 0).any()) for axis in parted)


def _code(piece: Piece, gradient: Tensor | None) -> int:
    """Where ``gradient`` lies as one number: ``NONE``, ``IN_PLACE``, or above these a digit for each mesh axis."""
    assert piece.spec is not None
    if gradient is None:
        return NONE
    digits: Iterable[int] = [UNKNOWN] * piece.spec.mesh.ndim
    if isinstance(gradient, DTensor) and same_ranks(gradient.device_mesh, piece.spec.mesh):
        if gradient.placements == piece.spec.placements:
            return IN_PLACE
        digits = map(_digit, gradient.placements)
    code = 1
    for digit in digits:
        code = code * BASE + digit
    return code


def _digit(placement: Placement) -> int:
    """Its code, which :func:`_decode` reads: [Note: a new sharding] in layouts/__init__.py."""
    if isinstance(placement, Replicate):
        return 0
    if type(placement) is Partial and placement.reduce_op in SUMS:
        return 1 + SUMS.index(placement.reduce_op)
    if type(placement) is Shard and 3 + placement.dim < UNKNOWN:
        return 3 + placement.dim
    return UNKNOWN


def _decode(code: int) -> tuple[Placement, ...]:
    placements: list[Placement] = []
    while code > 1:
        code, digit = divmod(code, BASE)
        if digit == UNKNOWN:
            raise refusals.cannot_be_summed()
        placements.append(Replicate() if digit == 0 else Partial(SUMS[digit - 1]) if digit < 3 else Shard(digit - 3))
    return tuple(reversed(placements))


def _agreed(mesh: DeviceMesh, codes: list[int]) -> list[tuple[Placement, ...] | None]:
    """How the ranks of ``mesh`` hold each gradient that they must move; None where it is in place, or nowhere."""
    high = torch.tensor(codes, dtype=torch.int64, device=mesh.device_type)
    low = torch.where(high == NONE, NOTHING_LOWER, -high)  # ranks without a gradient have no say
    words = torch.cat([high, low])
    for axis in range(mesh.ndim):
        dist.all_reduce(words, dist.ReduceOp.MAX, group=mesh.get_group(axis))
    highest, lowest = words.chunk(2)
    if bool(((highest != -lowest) & (highest != NONE)).any()):
        raise refusals.placements_differ()
    return [_decode(int(code)) if code > IN_PLACE else None for code in highest.tolist()]


def _zeros(piece: Piece, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    whole = [p if cuts(p) else Replicate() for p in placements]
    shape, _ = compute_local_shape_and_global_offset(piece.shape, mesh, whole)
    local = torch.zeros(shape, dtype=piece.dtype, device=piece.device)
    stride = torch.empty(piece.shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=piece.shape, stride=stride)
