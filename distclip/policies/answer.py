"""A policy's decision, checked once for all policies, before anything changes.

The host checks numbers that it knows. On an accelerator, where that would be a host sync, the device checks, and the
host learns the result one call later.
"""

from dataclasses import dataclass
from numbers import Real
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from ..kernels.transfer import sent
from .adopt import is_dense
from .autoclip import AutoClip
from .max_norm import MaxNorm
from .protocol import Decision, Policy, State
from .statistics import Statistics
from .value_clip import ValueClip

RULES = {
    "max_norm": "a number above 0, or inf for no bound",
    "coef": "a number above 0 and at most 1",
    "bounds": "two numbers, low <= 0 <= high, not both 0",
    "skip": "a bool, a 0-d tensor or None",
}
FIELDS = tuple(RULES)
TRUSTED = (MaxNorm, ValueClip, AutoClip)  # by their exact class: a subclass may decide otherwise


@dataclass(slots=True)
class Numbers:
    """A decision that the host has read."""

    max_norm: float
    skip: bool
    bounds: tuple[float, float] | None
    coef: float | None

    @classmethod
    def of(cls, decision: Decision, policy: Policy) -> "Numbers":
        """Read ``decision``; ValueError if a field is no number."""
        skip, bounds, coef = decision.skip, decision.bounds, decision.coef
        return cls(
            _read(decision.max_norm, "max_norm", policy),
            skip is not None and _read(skip, "skip", policy) != 0,
            None if bounds is None else _read_bounds(bounds, policy),
            None if coef is None else _read(coef, "coef", policy),
        )

    def check(self, policy: Policy) -> None:
        """ValueError if no step can use it."""
        if not self.max_norm > 0:  # true for NaN too
            raise refusal("max_norm", policy, self.max_norm)
        if self.coef is not None and not 0 < self.coef <= 1:
            raise refusal("coef", policy, self.coef)
        if self.bounds is not None:
            _check_bounds(self.bounds, policy)


@dataclass(frozen=True, slots=True)
class Tensors:
    """A decision in 0-d tensors on an accelerator, float64 or bool, without a host sync.

    Elementwise bounds that are numbers stay so, and so does the bound of a trusted policy. ``skip`` is None if no step
    is skipped.
    """

    max_norm: Tensor | float
    skip: Tensor | None
    bounds: tuple[float, float] | tuple[Tensor, Tensor] | None
    coef: Tensor | None
    trusted: bool

    @classmethod
    def of(cls, decision: Decision, policy: Policy, device: torch.device) -> "Tensors":
        """Bring ``decision`` to ``device``; ValueError if a field is no number, or bounds that are numbers are bad."""
        skip, coef, bound, trusted = decision.skip, decision.coef, decision.max_norm, is_trusted(policy)
        return cls(
            bound if isinstance(bound, float) and trusted else _on(device, bound, "max_norm", policy),
            None if skip is None or skip is False else _on(device, skip, "skip", policy) != 0,
            _bounds_on(device, decision.bounds, policy),
            None if coef is None else _on(device, coef, "coef", policy),
            trusted,
        )

    def fault(self) -> Tensor:
        """What no step can use: 0-d float64, 0 for nothing or a code for :func:`refusal_of`."""
        assert isinstance(self.max_norm, Tensor), "policies that are trusted are not asked"
        fault = torch.where(self.max_norm > 0, 0.0, 1.0)  # of NaN too
        if self.coef is not None:
            fault = torch.where((self.coef > 0) & (self.coef <= 1), fault, 2.0)
        if self.bounds is not None and isinstance(self.bounds[0], Tensor):
            low, high = self.bounds
            fault = torch.where((low <= 0) & (high >= 0) & (low < high), fault, 3.0)
        return fault.double()


def is_trusted(policy: Policy) -> bool:
    """Whether its numbers keep the rules by construction, so that no device needs to check them."""
    return type(policy) in TRUSTED


def ask(policy: Policy, statistics: Statistics, state: State) -> tuple[Decision, State]:
    """What ``policy`` decides on ``statistics``, and the state after it. Unless trusted it gets a copy of the state.

    ValueError if it returns no decision, or a state whose keys, shapes and dtypes are not those of ``state``.
    """
    handed = state if is_trusted(policy) else {name: value.clone() for name, value in state.items()}
    answer = policy.decide(statistics, handed)
    if not isinstance(answer, (tuple, list)) or len(answer) != 2 or not isinstance(answer[0], Decision):
        got = [type(part).__name__ for part in answer] if isinstance(answer, (tuple, list)) else type(answer).__name__
        raise ValueError(
            f"{_name(policy)}.decide returned {got}, and no step was made: return a Decision and the state"
        )
    decision, after = answer
    if not isinstance(after, dict) or after.keys() != state.keys():
        got = f"the keys {sorted(map(str, after))}" if isinstance(after, dict) else f"a {type(after).__name__} for it"
        raise ValueError(
            f"{_name(policy)}.decide returned a state with {got}, and no step was made: return those of init, "
            f"{sorted(state)}"
        )
    return decision, {name: _like(own, after[name], name, policy) for name, own in state.items()}


def refusal_of(fault: float, policy: Policy) -> ValueError:
    """The error for what :meth:`Tensors.fault` found."""
    return refusal(FIELDS[int(fault) - 1], policy)


def refusal(field: str, policy: Policy, *value: Any) -> ValueError:
    """The error for a ``field`` of a decision, with its value if it is known."""
    what = f"{field} = {_shown(*value)}" if value else f"a {field} that no step can use"
    return ValueError(f"{_name(policy)}.decide returned {what}, and no step was made: return {RULES[field]}")


def _check_bounds(bounds: tuple[float, float], policy: Policy) -> None:
    low, high = bounds
    if not (low <= 0 <= high and low < high):
        raise refusal("bounds", policy, bounds)


def _read_bounds(bounds: Any, policy: Policy) -> tuple[float, float]:
    low, high = _two(bounds, policy)
    return _read(low, "bounds", policy), _read(high, "bounds", policy)


def _bounds_on(device: torch.device, bounds: Any, policy: Policy) -> tuple[float, float] | tuple[Tensor, Tensor] | None:
    if bounds is None:
        return None
    low, high = _two(bounds, policy)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return _on(device, low, "bounds", policy), _on(device, high, "bounds", policy)
    numbers = _read_bounds(bounds, policy)
    _check_bounds(numbers, policy)
    return numbers


def _two(bounds: Any, policy: Policy) -> tuple[Any, Any]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise refusal("bounds", policy, bounds)
    return bounds[0], bounds[1]


def _one(value: Any, field: str, policy: Policy) -> Any:
    """``value``: a real tensor with one element, or a Python number; ValueError for anything else."""
    if isinstance(value, Tensor):
        real = value.dtype.is_floating_point or not (
            value.is_complex() or (value.dtype == torch.bool and field != "skip")
        )
        if value.numel() == 1 and real and is_dense(value):
            return value
    elif getattr(value, "shape", None) == ():  # NumPy's
        value = value.item()
    if isinstance(value, Real) and (field == "skip" or not isinstance(value, bool)):
        return value
    raise refusal(field, policy, value)


def _read(value: Any, field: str, policy: Policy) -> float:
    one = _one(value, field, policy)
    return float(one.item() if isinstance(one, Tensor) else one)


def _on(device: torch.device, value: Any, field: str, policy: Policy) -> Tensor:
    one = _one(value, field, policy)
    if not isinstance(one, Tensor):
        return torch.full((), float(one), dtype=torch.float64, device=device)
    return sent(one.detach(), device).double().reshape(())


def _like(own: Tensor, value: Any, name: str, policy: Policy) -> Tensor:
    """``value`` as the successor of ``own`` in the state; ValueError if it does not fit."""
    if not is_dense(value) or value.shape != own.shape or value.dtype != own.dtype:
        raise ValueError(
            f"{_name(policy)}.decide returned state {name} as {_shown(value)}, and no step was made: return it as init "
            f"made it, {_shown(own)}"
        )
    tensor: Tensor = value.detach() if value.requires_grad else value
    return tensor


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return short(value)
    kind = "a dense tensor" if is_dense(value) else f"a {type(value).__name__} that is not dense"
    return f"{kind} of shape {tuple(value.shape)} and dtype {value.dtype}"  # its numbers may have to be waited for


def _name(policy: Policy) -> str:
    return type(policy).__qualname__
