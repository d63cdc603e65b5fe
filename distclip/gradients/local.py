"""Local: this rank's gradients of one step, as they are summed and scaled."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from ..errors import LayoutError
from ..kernels import Pattern

ByReplicas: TypeAlias = Sequence[tuple[int, Sequence[int]]]
"""How many ranks hold the same elements, and the positions of the tensors of which that is true."""


@dataclass(frozen=True, slots=True)
class Local:
    """This rank's gradients of one step.

    * ``runs``: what is summed on the host, and scaled: merged where gradients are neighbours in memory.
    * ``by_replicas``: which of ``runs`` are held by how many ranks, and by the same ranks where copies are compared.
    * ``families``: of each of these groups, which ranks have copies of it: see ``Plan.families``.
    * ``tensors``: one for each gradient that exists and is in place; ``spans``: which of them, and what of it, each
      piece is, None where each piece is one of them.
    * ``indices``: which pieces these are.
    * ``wide``: whether some of them are float64, which their parameters need not be.
    * ``misplaced``: how many gradients wait to be realigned.
    * ``instead``: gradients to be stored in place of those found, by source.
    * ``pattern``: how they lie in ``runs``; None where that was not noted.
    * ``error``: what makes these gradients unusable on this rank, to be raised once all ranks have taken part.
    """

    runs: Sequence[Tensor]
    by_replicas: ByReplicas
    tensors: Sequence[Tensor]
    spans: Sequence[tuple[int, slice | None]] | None
    indices: Sequence[int]
    wide: bool
    misplaced: int = 0
    instead: dict[int, Tensor] = field(default_factory=dict)
    error: LayoutError | None = None
    pattern: Pattern | None = None
    families: Sequence[int] = ()

    def parts(self) -> Sequence[Tensor]:
        """The local gradients piece by piece, as plain tensors."""
        if self.spans is None:
            return self.tensors
        return [self.tensors[k] if span is None else self.tensors[k][span] for k, span in self.spans]


def grouped_by_replicas(kinds: Iterable[tuple[int, int]]) -> tuple[ByReplicas, Sequence[int]]:
    """The positions of equal numbers of replicas and families together, once for each; and the families of these."""
    positions: dict[tuple[int, int], list[int]] = {}
    for k, kind in enumerate(kinds):
        positions.setdefault(kind, []).append(k)
    return [(replicas, places) for (replicas, _), places in positions.items()], [family for _, family in positions]
