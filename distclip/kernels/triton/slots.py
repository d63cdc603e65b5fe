"""Norms that were taken before they are asked for, on the device, and what shows whether they still hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

SAMPLES = 32  # elements of each gradient that are kept, spread over it


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """A place for each of n gradients on one device, all memory made at once.

    * ``norms``: float64, (n,).
    * ``known``: int32, (n,): 1 where the norm is that of the gradient, as far as anybody knows.
    * ``where``: int64, (n, 2): address and number of elements of the gradient that was read.
    * ``samples``: int64, (n, 32): the bits of some of its elements.
    """

    norms: Tensor
    known: Tensor
    where: Tensor
    samples: Tensor

    @classmethod
    def of(cls, n: int, device: torch.device) -> Self:
        return cls(
            norms=torch.zeros(n, dtype=torch.float64, device=device),
            known=torch.zeros(n, dtype=torch.int32, device=device),
            where=torch.zeros(n, 2, dtype=torch.int64, device=device),
            samples=torch.zeros(n, SAMPLES, dtype=torch.int64, device=device),
        )

    @property
    def device(self) -> torch.device:
        return self.norms.device

    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.known, self.where, self.samples

    def forget(self, places: Sequence[int] | None = None) -> None:
        """Nothing is known of these any more, or of all. Does not wait, and copies nothing from the host."""
        if places is None:
            self.known.zero_()
        elif places:
            every = self.known.unbind()
            torch._foreach_zero_([every[k] for k in places])

    def norms_at(self, places: Sequence[int], empty: Sequence[int] = ()) -> Tensor:
        """A copy of the norms at these places, in their order; 0 at those that are ``empty``."""
        every = self.norms.unbind()
        if empty:
            torch._foreach_zero_([every[k] for k in empty])
        if list(places) == list(range(len(every))):
            return self.norms.clone()
        return torch.stack([every[k] for k in places])
