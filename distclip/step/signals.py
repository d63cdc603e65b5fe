"""Signals: numbers of the user that travel with the norm, for policies that ask for them."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any, TypeAlias

from torch import Tensor

from ..policies.checks import is_dense
from ..ranks.message import Scalar
from . import refusals

Signals: TypeAlias = Mapping[str, Tensor | float]
"""Numbers by name, such as the loss of this rank: Python numbers, or real tensors with one element."""


def given(signals: Signals, wanted: Sequence[str]) -> list[Scalar]:
    """Those that are ``wanted``, in this order: float, or 0-d and detached; ValueError for others, and for fewer."""
    if not isinstance(signals, Mapping) or set(signals) != set(wanted):
        raise refusals.other_signals(signals, wanted)
    return [_number(name, signals[name]) for name in wanted]


def _number(name: str, signal: Any) -> Scalar:
    if is_dense(signal) and signal.numel() == 1 and not signal.is_complex():
        number: Tensor = signal.detach().reshape(())
        return number
    if isinstance(signal, Real):
        with suppress(OverflowError):  # of a whole number beyond float64
            return float(signal)
    raise refusals.no_signal(name, signal)
