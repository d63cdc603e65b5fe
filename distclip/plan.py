"""Plan: made once from the parameters; says what is summed together, where, and whether ranks talk at all.

Which collectives run, and their shape, follow from the plan and never from which gradients exist: a rank without
tokens for its experts, with an empty shard or with gradients that are None contributes zeros and takes part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import inf

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .errors import LayoutError
from .gradient import look_at
from .group import Axis, ClippingGroup
from .kernels import local_norms
from .layout import LayoutFn, LayoutReader
from .piece import Piece
from .realign import is_candidate, realign
from .words import Reduced, reduce_norm

WIDE = (torch.float64, torch.complex128)
REALIGNED = 1 << 14  # tag of the second all-reduce of a call that had to realign gradients
TAG_STEP = 0x9E37  # odd, so that different tags stay different modulo 2**16


@dataclass(frozen=True, slots=True)
class Local:
    """This rank's part of one measurement.

    * ``gradients``: the local gradients that exist and are in place, as plain tensors.
    * ``indices``: which piece each belongs to.
    * ``norms``: the p-norm of each, float64, shape (len(gradients),), on the plan's device.
    * ``misplaced``: how many gradients wait to be realigned.
    * ``instead``: gradients to be stored in place of those found, by piece.
    * ``error``: what makes these gradients unusable on this rank, to be raised once all ranks have met.
    """

    gradients: list[Tensor]
    indices: list[int]
    norms: Tensor
    misplaced: int
    instead: dict[int, Tensor]
    error: LayoutError | None


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement.

    * ``realigned``: whether gradients of some rank had to be brought to their parameters' placements by talking.
    * ``dtype``: of the norm that users see, the same on every rank: float64 where some rank has such a parameter.
    * ``can_overflow``: whether finite gradients may have a power sum beyond float64; those of fp32 cannot up to p = 7.
    """

    local: Local
    reduced: Reduced
    realigned: bool
    dtype: torch.dtype
    can_overflow: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Built by :meth:`of`."""

    pieces: tuple[Piece, ...]
    group: ClippingGroup
    p: float
    replicas: tuple[int, ...]  # of each piece
    weights: Tensor  # (len(pieces),) float64 on `device`: 1 / replicas, or 1 when no rank talks to another
    device: torch.device
    wide: bool  # whether this rank has float64 parameters
    common: tuple[bool, ...]  # which pieces every rank of the group must know
    code: int  # hash of the common pieces
    asks: bool  # whether two words more ask all ranks for misplaced gradients and float64: the same on all ranks
    heeds: bool  # whether the answers can be yes on a rank other than this one, so that they must be read

    @classmethod
    def of(
        cls,
        pieces: Sequence[Piece],
        p: float,
        group: ClippingGroup,
        split_over: Sequence[Axis] = (),
        layout: LayoutFn | None = None,
        asks: bool = False,
    ) -> "Plan":
        """Read every piece's layout; a parameter listed twice counts once. No collective.

        ``asks`` makes the words travel that say whether gradients are misplaced, also where this rank's cannot be.
        """
        unique = {(id(p.holder), None if p.span is None else p.name): p for p in reversed(pieces)}
        kept = tuple(reversed(unique.values()))
        reader = LayoutReader(group, split_over, layout)
        holdings = [reader.read(_label(i, piece), piece) for i, piece in enumerate(kept)]
        digest = blake2b(digest_size=6)
        for piece, holding in zip(kept, holdings, strict=True):
            if holding.common:
                digest.update(_describe(piece, holding.layout.replicas))
        holders = [piece.holder for piece in kept]
        device = group.device_for(holders)
        replicas = tuple(holding.layout.replicas for holding in holdings)
        heeds = group.size > 1 and (bool(split_over or layout) or any(map(is_candidate, kept)))
        return cls(
            pieces=kept,
            group=group,
            p=p,
            replicas=replicas,
            weights=torch.tensor(replicas, dtype=torch.float64, device=device).reciprocal(),
            device=device,
            wide=any(t.dtype in WIDE for t in holders),
            common=tuple(holding.common for holding in holdings),
            code=int.from_bytes(digest.digest()),
            asks=asks or heeds,
            heeds=heeds,
        )

    def label(self, index: int) -> str:
        """What errors call piece ``index``."""
        return _label(index, self.pieces[index])

    def measure(self, tag: int = 0, given: Sequence[Tensor | None] | None = None, eager: bool = False) -> Measured:
        """Measure the gradients of the pieces, or those ``given``, one for each piece.

        One all-reduce if the group has one. Where its answers say that gradients wait to be realigned, that is done,
        stored in ``.grad`` unless ``given``, and measured again; ``eager`` realigns first, which every rank must then
        do. Waits for an accelerator only to read those answers, where they can be yes. ``tag`` is mixed into the
        agreement word. An error of this rank is raised after it has taken part.
        """
        gradients = [piece.holder.grad for piece in self.pieces] if given is None else list(given)
        error = None
        if eager:
            gradients, error = self._realigned(gradients, store=given is None)
        local = self.look(gradients, error)
        reduced = self._reduce(local, tag)
        wide = self.wide
        if self.heeds:
            disagree, misplaced, wide = torch.stack([reduced.disagree, *reduced.answers]).tolist()
            if misplaced and not disagree:
                gradients, error = self._realigned(gradients, store=given is None)
                local = self.look(gradients, error)
                reduced = self._reduce(local, tag + REALIGNED)
                eager = True
        if local.error is not None:
            raise local.error
        if given is None:
            self._store(local.instead)
        dtype = torch.float64 if wide else torch.float32
        return Measured(local, reduced, eager, dtype, can_overflow=wide or 7 < self.p < inf)

    def look(self, gradients: Sequence[Tensor | None], error: LayoutError | None = None) -> Local:
        """Take the local norms of ``gradients``, one for each piece, None where there is none."""
        found: list[Tensor] = []
        indices: list[int] = []
        instead: dict[int, Tensor] = {}
        misplaced = 0
        for i, (piece, gradient) in enumerate(zip(self.pieces, gradients, strict=True)):
            if gradient is None:
                continue
            seen = look_at(piece, gradient)
            if seen.problem is not None:
                error = error or LayoutError(f"the gradient of {self.label(i)} {seen.problem}")
            elif seen.values is None:
                misplaced += 1
            else:
                found.append(seen.values)
                indices.append(i)
            if seen.instead is not None:
                instead[i] = seen.instead
        return Local(found, indices, self._norms(found), misplaced, instead, error)

    def _reduce(self, local: Local, tag: int) -> Reduced:
        if self.p == inf:
            mine = local.norms.max() if len(local.indices) else local.norms.new_zeros(())
        else:
            weights = self.weights if len(local.indices) == len(self.pieces) else self.weights[local.indices]
            mine = torch.dot(local.norms.pow(self.p), weights)
        questions = (local.misplaced > 0, self.wide) if self.asks else ()
        return reduce_norm(self.group, mine, self.p, self.code + tag * TAG_STEP, local.error is not None, questions)

    def _realigned(
        self, gradients: Sequence[Tensor | None], store: bool
    ) -> tuple[list[Tensor | None], LayoutError | None]:
        try:
            moved = realign(self.pieces, gradients)
        except LayoutError as error:  # raised once this rank has taken part in the next all-reduce
            return list(gradients), error
        if store:
            self._store({i: new for i, new in enumerate(moved) if new is not None and new is not gradients[i]})
        return moved, None

    def _store(self, instead: dict[int, Tensor]) -> None:
        for i, gradient in instead.items():
            self.pieces[i].holder.grad = gradient

    def _norms(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        devices = {t.device for t in gradients}
        if len(devices) == 1:
            return local_norms(gradients, self.p).to(self.device, non_blocking=self.device.type != "cpu")
        norms = torch.zeros(len(gradients), dtype=torch.float64, device=self.device)
        for device in devices:
            here = [i for i, t in enumerate(gradients) if t.device == device]
            norms[here] = local_norms([gradients[i] for i in here], self.p).to(self.device)
        return norms


def _label(index: int, piece: Piece) -> str:
    return piece.name or f"parameter {index} of shape {tuple(piece.holder.shape)}"


def _describe(piece: Piece, replicas: int) -> bytes:
    placements = () if piece.spec is None else piece.spec.placements
    whole = isinstance(piece.holder, DTensor) or (piece.spec is None and not piece.flat_over)
    shape = tuple(piece.holder.shape) if whole else piece.size  # local shapes of pieces differ between ranks
    return f"{piece.name}|{shape}|{piece.holder.dtype}|{placements}|{replicas};".encode()
