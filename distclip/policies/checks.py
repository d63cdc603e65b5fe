"""Checks of users' numbers and tensors; each error names the argument."""

from math import inf, isnan
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .units import Units


def positive(name: str, value: float, note: str = "") -> float:
    """``value`` as a float above 0, inf included; ValueError for anything else, NaN included."""
    number = _number(name, value)
    if isnan(number) or number <= 0:
        raise ValueError(f"{name} must be above 0{f' ({note})' if note else ''}, got {value!r}")
    return number


def finite(name: str, value: float) -> float:
    """``value`` as a finite float above 0; ValueError for anything else."""
    number = positive(name, value)
    if number == inf:
        raise ValueError(f"{name} must be finite, got {value!r}")
    return number


def share(name: str, value: float) -> float:
    """``value`` as a float above 0 and below 1; ValueError for anything else."""
    number = _number(name, value)
    if not 0 < number < 1:
        raise ValueError(f"{name} must be above 0 and below 1, got {value!r}")
    return number


def whole(name: str, value: int, least: int = 1) -> int:
    """``value``; ValueError if it is no int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def bounds(name: str, value: float | tuple[float, float]) -> tuple[float, float]:
    """(low, high) from a number c > 0, meaning (-c, c), or from a pair on both sides of 0, one of which may be 0."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} must be a number or (min, max), got {value!r}")
        low, high = (_number(name, v) for v in value)
        if not (low <= 0 <= high and low < high):  # false for NaN too
            raise ValueError(f"{name} must be (min, max) with min <= 0 <= max, not both 0, got {value!r}")
        return low, high
    number = positive(name, value)
    return -number, number


def count(name: str, value: object) -> int:
    """``value`` as a whole number from 0; ValueError for anything else."""
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if not 0 <= number < 2**62:
        raise ValueError(f"{name} must lie between 0 and 2**62, which {hex(number)} does not")
    return number


def euclidean(policy: object, units: Units) -> None:
    """ValueError unless norms are those of ``norm_type=2``."""
    if units.p != 2:
        raise ValueError(f"{type(policy).__qualname__} is defined for norm_type=2 alone, got norm_type={units.p!r}")


def is_dense(value: Any) -> bool:
    """Whether it is a tensor whose elements are all in the memory of this rank."""
    dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    return dense and not isinstance(value, DTensor)


def _number(name: str, value: float) -> float:
    if isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None
