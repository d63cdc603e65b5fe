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
class Warmup:
    """From ``start`` to ``end`` in a straight line over ``steps`` steps, and ``end`` ever after.

    Step 0, the first, has the bound ``start``, and step ``steps`` has ``end``. No host sync.

    >>> Warmup(10.0, 1.0, steps=100)(50).item()
    5.5
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.start, self.end, self.steps)

    def __call__(self, step: Tensor | int) -> Tensor:
        return _between(self.start, self.end, _done(step, self.steps))


@dataclass(frozen=True, slots=True)
class Cosine:
    """From ``start`` to ``end`` along half a cosine over ``steps`` steps, and ``end`` ever after.

    The bound is ``end + (start - end) * (1 + cos(pi * step / steps)) / 2``. No host sync.

    >>> Cosine(10.0, 1.0, steps=100)(50).item()
    5.5
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.start, self.end, self.steps)

    def __call__(self, step: Tensor | int) -> Tensor:
        return _between(self.start, self.end, (1 - torch.cos(pi * _done(step, self.steps))) / 2)


def _check(start: float, end: float, steps: int) -> None:
    finite("start", start)
    finite("end", end)
    whole("steps", steps)


def _done(step: Tensor | int, steps: int) -> Tensor:
    """The share of the steps that were made, 0-d float64."""
    return (torch.as_tensor(step, dtype=torch.float64) / steps).clamp(0.0, 1.0)


def _between(start: float, end: float, share: Tensor) -> Tensor:
    return start * (1 - share) + end * share  # both ends exactly
