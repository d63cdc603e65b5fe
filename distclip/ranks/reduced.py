"""What the one all-reduce brought: the total norm, and what the reduced numbers say beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, nan, sqrt
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .agreement import COPIES

Scalar: TypeAlias = Tensor | float
"""A number where messages are reduced on the host, a 0-d float64 tensor where they are reduced on an accelerator."""


class HostNumbers(NamedTuple):
    """A reduced message as the host has read it, and ``more`` numbers that were copied behind it."""

    own: float
    norm: float
    disagree: float  # 0 if all ranks agree
    drift: bool
    more: Sequence[float]


@dataclass(frozen=True, slots=True)
class Reduced:
    """The reduced message, the same on every rank except for ``own``: numbers on the host, 0-d tensors elsewhere.

    * ``norm``: the total norm, float64; a tensor is NaN where ranks disagree.
    * ``disagree``: whether ranks sent different codes or reported a fault.
    * ``flags``: for each flag of the message, whether some rank has set it: a number above 0.
    * ``own``: what this rank sent for the norm, if every rank holds all gradients whole; else None. For p < inf its sum
      of powers divided by the number of replicas, for p = inf its norm.
    * ``drift``: whether copies differ. True beside a ``disagree`` that is True: one of the two, ranks have to ask.
    * ``amounts``: what was sent beside the drift word, reduced.
    * ``who``: appended to the error on a disagreement: which ranks differ; empty if nobody asked.
    * ``row``: own, norm, disagreement and, where one was sent, the drift word as a view of the message, float64, if
      they are neighbours there: the host can then copy them without a kernel that gathers them.
    * ``sums``: the reduced vector where one was sent, (n,) float64, on the device of the message.
    """

    norm: Scalar
    disagree: Tensor | bool
    flags: tuple[Scalar, ...]
    own: Scalar | None = None
    drift: Tensor | bool = False
    amounts: tuple[Scalar, ...] = ()
    who: str = ""
    row: Tensor | None = None
    sums: Tensor | None = None

    def unscaled(self, scale: float, p: float) -> "Reduced":
        """The same for gradients divided by ``scale``; ``sums`` stay as they are."""
        own = self.own
        if own is not None:  # scale ** p may leave float64 where this does not
            own = own / scale if p == inf else _power(root(own, p) / scale, p)
        return replace(self, norm=self.norm / scale, own=own, row=None)

    def judged(self) -> "Reduced":
        """The same once it is known what its copies are."""
        return replace(self, drift=False, row=None if self.row is None else self.row[:3])

    def tensor(self, device: torch.device) -> Tensor:
        """The norm as a 0-d float64 tensor, NaN where ranks disagree. ``device``: where messages are reduced."""
        if isinstance(self.norm, Tensor):
            return self.norm
        return torch.scalar_tensor(nan if self.disagree else self.norm, dtype=torch.float64, device=device)

    def for_host(self, device: torch.device) -> Tensor:
        """What the host will want to know, 1-D float64 on ``device``; :meth:`from_copy` reads a copy of it."""
        if self.row is not None:
            return self.row
        norm = self.tensor(device)
        if self._is_norm_alone():
            return norm.view(1)
        own = norm if self.own is None else self.own
        numbers = (own, norm, self.disagree, *([self.drift] if isinstance(self.drift, Tensor) else []))
        return torch.stack([_beside(norm, scalar) for scalar in numbers])

    def from_copy(self, numbers: Sequence[float]) -> HostNumbers:
        """The numbers of :meth:`for_host`, and those that were copied behind them."""
        if self._is_norm_alone():
            return HostNumbers(numbers[0], numbers[0], 0.0, False, numbers[1:])
        own, norm, disagree, *more = numbers
        drift = more.pop(0) if isinstance(self.drift, Tensor) else 0.0
        return HostNumbers(own, norm, disagree, drift % COPIES != 0, more)

    def _is_norm_alone(self) -> bool:
        """Whether there are no other ranks to disagree with or to compare ``own`` with."""
        return self.disagree is False and self.own is None

    def read(self) -> tuple[float, bool, list[bool]]:
        """Norm, disagreement and flags as numbers: one host sync if they are on an accelerator."""
        if not isinstance(self.norm, Tensor):
            return self.norm, bool(self.disagree), [float(flag) > 0 for flag in self.flags]
        row = torch.stack([_beside(self.norm, scalar) for scalar in (self.norm, self.disagree, *self.flags)])
        norm, disagree, *flags = row.tolist()
        return norm, bool(disagree), [flag > 0 for flag in flags]


def _beside(norm: Tensor, scalar: Scalar) -> Tensor:
    """``scalar`` as float64 on the device of ``norm``."""
    return scalar.double() if isinstance(scalar, Tensor) else torch.full_like(norm, scalar)


def _power(norm: Scalar, p: float) -> Scalar:
    """The sum of powers of which ``norm`` is the norm, p < inf."""
    return norm.pow(p) if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64).pow(p).item()


def root(total: Scalar, p: float) -> Scalar:
    """The norm of which ``total`` is the sum of powers, or for p = inf itself the norm."""
    if p == inf:
        return total
    if p == 2:
        return total.sqrt() if isinstance(total, Tensor) else sqrt(total)
    if isinstance(total, Tensor):
        return total.pow(1 / p)
    return torch.tensor(total, dtype=torch.float64).pow(1 / p).item()  # Python's own raises where it overflows
