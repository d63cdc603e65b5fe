"""Bounds that change with the step, for :class:`.MaxNorm`."""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from typing import TypeAlias

import torch
from torch import Tensor

from .checks import finite, whole
from .protocol import Number

Schedule: TypeAlias = Callable[[Tensor], Number]
"""A bound by the step: called with how many were made, 0-d int64, on the device where the norm is reduced."""


@dataclass(frozen=True, slots=True)
class _Between:
    """A bound that goes from one to another; along which curve, a subclass says."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        finite("start", self.start)
        finite("end", self.end)
        whole("steps", self.steps)

    def __call__(self, step: Tensor | int) -> Tensor:
        share = self._share((torch.as_tensor(step, dtype=torch.float64) / self.steps).clamp(0.0, 1.0))
        return self.start * (1 - share) + self.end * share  # both ends exactly

    def _share(self, done: Tensor) -> Tensor:
        """How much of ``end`` the bound is, from 0 to 1, when ``done`` of the steps are made: both 0-d float64."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Warmup(_Between):
    """From ``start`` to ``end`` in a straight line over ``steps`` steps, and ``end`` ever after.

    Step 0, the first, has the bound ``start``, and step ``steps`` has ``end``. No host sync.

    >>> Warmup(10.0, 1.0, steps=100)(50).item()
    5.5
    """

    def _share(self, done: Tensor) -> Tensor:
        return done


@dataclass(frozen=True, slots=True)
class Cosine(_Between):
    """From ``start`` to ``end`` along half a cosine over ``steps`` steps, and ``end`` ever after.

    The bound is ``end + (start - end) * (1 + cos(pi * step / steps)) / 2``. No host sync.

    >>> Cosine(10.0, 1.0, steps=100)(50).item()
    5.5
    """

    def _share(self, done: Tensor) -> Tensor:
        return (1 - torch.cos(pi * done)) / 2
