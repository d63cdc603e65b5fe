"""Signals: numbers of the user that travel with the norm, for policies that ask for them."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

from torch import Tensor
from torch.distributed.tensor import DTensor

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
    if isinstance(signal, Tensor) and not isinstance(signal, DTensor):
        if signal.numel() == 1 and not signal.is_complex():
            return signal.detach().reshape(())
    elif isinstance(signal, Real):
        return float(signal)
    raise refusals.no_signal(name, signal)
