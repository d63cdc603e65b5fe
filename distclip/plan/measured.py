"""What a plan finds when it measures gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..ranks.message import Reduced
from .slots import ByPiece


@dataclass(frozen=True, slots=True)
class Norms:
    """The p-norm of every local gradient: float64, shape (len(indices),), on the plan's device.

    ``indices``: which pieces they belong to. ``parts``: the gradients, or nothing where they have changed since.
    """

    norms: Tensor
    indices: Sequence[int]
    parts: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement.

    * ``gradients``: of the plan's sources, as they were summed; ``runs``: the same as plain tensors, to be scaled.
    * ``norms``: of each gradient, where they were needed anyway (see :func:`.measure.norms_of`).
    * ``realigned``: whether gradients of some rank had to be brought to their parameters' placements by communicating.
    * ``dtype``: of the norm that users see, the same on every rank: float64 where some rank has such a parameter.
    * ``can_overflow``: whether finite gradients may have a norm or a power sum beyond float64; those of fp32 cannot for
      p from 1/16 to 7.
    * ``scale``: by which gradients are multiplied, and ``reduced`` is not.
    * ``by_piece``: the gradients piece by piece, where the plan has slots.
    * ``bits``: of each piece whose bits are compared, where its gradient is on an accelerator.
    """

    gradients: Sequence[Tensor | None]
    runs: Sequence[Tensor]
    norms: Norms | None
    reduced: Reduced
    realigned: bool
    dtype: torch.dtype
    can_overflow: bool
    scale: float = 1.0
    by_piece: ByPiece | None = None
    bits: Mapping[int, Tensor] = field(default_factory=dict)

    def without_gradients(self) -> "Measured":
        """What may be kept until the next call without keeping gradients alive."""
        norms = None if self.norms is None else replace(self.norms, parts=())
        by_piece = None if self.by_piece is None else self.by_piece._replace(parts=(), table=None)
        return replace(self, gradients=(), runs=(), norms=norms, by_piece=by_piece)
