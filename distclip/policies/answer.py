"""A policy's decision, checked once for all policies, before anything changes.

The host checks numbers that it knows. On an accelerator, where that would be a host sync, the device checks, and the
host learns the result one call later.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..kernels.transfer import sent
from .checks import is_dense
from .protocol import Decision, Policy, State
from .refusals import fault_code, no_decision, other_keys, other_state, refusal
from .statistic import MODEL, Statistic, asked
from .statistics import Statistics
from .trust import is_trusted
from .units import Units

MAY_BE_BOOL = ("skip", "extra")
REPORTED = ("norm", "max_norm", "coef", "skip")  # by the report itself


@dataclass(slots=True)
class Numbers:
    """A decision that the host has read.

    ``per``: what is bounded. ``max_norm`` and ``coef`` are numbers for the model, and else (units,) float64, in memory
    of their own where the policy's statistics are; a bound that is one good number for all units stays so.
    """

    max_norm: float | Tensor
    skip: bool
    bounds: tuple[float, float] | None
    coef: float | Tensor | None
    per: Statistic = MODEL

    @classmethod
    def of(cls, decision: Decision, policy: Policy, statistics: Statistics) -> "Numbers":
        """Read ``decision``; ValueError if a field is no number, or has another shape than the units of its level."""
        skip, bounds, coef = decision.skip, decision.bounds, decision.coef
        read: Callable[[Any, str, Policy], float | Tensor] = _read
        if (per := level_of(decision.per, policy, statistics.units)) is not MODEL:
            read = partial(on, device=statistics.norm().device, shape=statistics.units.shape(per))
        bound = decision.max_norm
        return cls(
            bound if isinstance(bound, float) and bound > 0 else read(bound, "max_norm", policy),
            skip is not None and _read(skip, "skip", policy) != 0,
            None if bounds is None else _read_bounds(bounds, policy),
            None if coef is None else read(coef, "coef", policy),
            per,
        )

    def check(self, policy: Policy, statistics: Statistics, finite: bool) -> None:
        """ValueError if no step can use it.

        ``finite``: whether the model's norm is. If not, only numbers of units whose own norm is finite matter, and NaN,
        which they may have from the model's norm, propagates as that does.
        """
        if self.per is not MODEL:
            self._check_units(policy, statistics, finite)
        elif finite:
            if not self.max_norm > 0:  # true for NaN too
                raise refusal("max_norm", policy, self.max_norm)
            if self.coef is not None and not 0 < self.coef < inf:
                raise refusal("coef", policy, self.coef)
        if finite and self.bounds is not None:
            _check_bounds(self.bounds, policy)

    def _is_good(self) -> bool:
        """Whether a look at the least and the largest of them shows that each unit has numbers to use."""
        bound, coef = self.max_norm, self.coef
        if isinstance(bound, Tensor) and not (len(bound) and bound.amin().item() > 0):  # of NaN too
            return False
        if isinstance(coef, Tensor):
            low, high = (each.item() for each in coef.aminmax()) if len(coef) else (0.0, inf)
            return low > 0 and high < inf
        return True

    def _check_units(self, policy: Policy, statistics: Statistics, finite: bool) -> None:
        if self._is_good():
            return
        for field, numbers, bad in bad_units(self.max_norm, self.coef):
            if bad.any():
                bad = bad if finite else bad & ~numbers.isnan()
                matters = bad.logical_and_(statistics.norm(self.per).isfinite())
                for unit in matters.nonzero().flatten()[:1].tolist():
                    raise refusal(field, policy, numbers[unit].item(), where=statistics.units.where(unit, self.per))


@dataclass(frozen=True, slots=True)
class Tensors:
    """A decision in tensors on an accelerator, float64 or bool, without a host sync.

    ``per``: what is bounded. ``max_norm`` and ``coef`` are 0-d for the model, else (units,) in memory of their own.
    Elementwise bounds that are numbers stay so, and so does the bound of a trusted policy. ``skip`` is None if no step
    is skipped.
    """

    max_norm: Tensor | float
    skip: Tensor | None
    bounds: tuple[float, float] | tuple[Tensor, Tensor] | None
    coef: Tensor | None
    trusted: bool
    per: Statistic = MODEL

    @classmethod
    def of(cls, decision: Decision, policy: Policy, statistics: Statistics, device: torch.device) -> "Tensors":
        """Bring ``decision`` to ``device``; ValueError for what is known to be wrong without a host sync.

        That is a field that is no number, another shape than the units of its level, and bounds that are bad numbers.
        """
        skip, coef, bound, trusted = decision.skip, decision.coef, decision.max_norm, is_trusted(policy)
        per = level_of(decision.per, policy, statistics.units)
        read = partial(on, device=device, shape=() if per is MODEL else statistics.units.shape(per))
        return cls(
            bound if isinstance(bound, float) and trusted and per is MODEL else read(bound, "max_norm", policy),
            None if skip is None or skip is False else on(skip, "skip", policy, device) != 0,
            _bounds_on(device, decision.bounds, policy),
            None if coef is None else read(coef, "coef", policy),
            trusted,
            per,
        )

    def fault(self, statistics: Statistics, finite: Tensor) -> Tensor:
        """What no step can use: 0-d float64, 0 for nothing or a code for :func:`.refusals.refusal_of`.

        ``finite``: 0-d bool, whether the model's norm is. Of a decision for the model it is not asked here. Of one for
        units, what is bad only where norms are not finite is no fault, and no NaN is where the model's is not.
        """
        assert isinstance(self.max_norm, Tensor), "policies that are trusted are not asked"
        if self.per is MODEL:
            fault = torch.where(self.max_norm > 0, 0.0, 1.0)  # of NaN too
            if self.coef is not None:
                fault = torch.where((self.coef > 0) & (self.coef < inf), fault, 2.0)
        else:
            fault = self._fault_of_units(statistics, finite)
        if self.bounds is not None and isinstance(self.bounds[0], Tensor):
            low, high = self.bounds
            good = (low <= 0) & (high >= 0) & (low < high)
            fault = torch.where(good if self.per is MODEL else good | ~finite, fault, 3.0)
        return fault.double()

    def _fault_of_units(self, statistics: Statistics, finite: Tensor) -> Tensor:
        matters = statistics.norm(self.per) < inf  # false for NaN too
        fault = torch.zeros((), dtype=torch.float64, device=finite.device)
        places = torch.arange(len(matters), dtype=torch.float64, device=finite.device)
        for field, numbers, bad in bad_units(self.max_norm, self.coef):
            if len(places):  # not argmax, which may return any of several maxima on an accelerator
                wrong = bad & matters & (finite | ~numbers.isnan())
                first = torch.where(wrong, places, inf).amin()
                one, step = fault_code(field, self.per, statistics.units)
                fault = torch.where(first < inf, first * step + one, fault)
        return fault


def bad_units(max_norm: Any, coef: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Field, numbers, and for which units no step can use them: (units,) bool, in new memory."""
    if isinstance(max_norm, Tensor):
        yield "max_norm", max_norm, (max_norm > 0).logical_not_()  # of NaN too
    if coef is not None:
        yield "coef", coef, ((coef > 0) & (coef < inf)).logical_not_()


def ask(policy: Policy, statistics: Statistics, state: State) -> tuple[Decision, State]:
    """What ``policy`` decides on ``statistics``, and the state after it. Unless trusted it gets a copy of the state.

    ValueError if it returns no decision, or a state whose keys, shapes and dtypes are not those of ``state``.
    """
    handed = state if is_trusted(policy) else {name: value.clone() for name, value in state.items()}
    answer = policy.decide(statistics, handed)
    if not isinstance(answer, (tuple, list)) or len(answer) != 2 or not isinstance(answer[0], Decision):
        raise no_decision(policy, answer)
    decision, after = answer
    if not isinstance(after, dict) or after.keys() != state.keys():
        raise other_keys(policy, after, state)
    if decision.extra or not isinstance(decision.extra, Mapping):
        decision = replace(decision, extra=_reported(decision.extra, policy, statistics))
    return decision, {name: _like(own, after[name], name, policy) for name, own in state.items()}


def _reported(extra: Any, policy: Policy, statistics: Statistics) -> dict[str, Tensor]:
    """What a policy reports of itself as tensors: 0-d, or for those inside :class:`PerParameter` (units,)."""
    if not isinstance(extra, Mapping) or not all(isinstance(name, str) and name not in REPORTED for name in extra):
        raise refusal("extra", policy, extra)
    device, units = statistics.norm().device, statistics.units.shape()
    shapes = {name: units if getattr(value, "shape", ()) == units else () for name, value in extra.items()}
    return {name: on(value, "extra", policy, device, shapes[name]).clone() for name, value in extra.items()}


def level_of(per: Any, policy: Policy, units: Units) -> Statistic:
    """The level that a decision bounds, of gradients; ValueError if there is none, or its units overlap."""
    if per in ("model", MODEL):
        return units.bounded
    if not isinstance(per, (str, Statistic)):
        raise refusal("per", policy, per)
    try:
        level = asked(per)  # type: ignore[arg-type]
        known = units.level(level)
    except ValueError as error:  # no level, or none that was asked for
        raise refusal("per", policy, per) from error
    if level.of != "gradient":
        raise refusal("per", policy, per)
    if known.unit_of_slot is None:
        raise refusal("per", policy, per, because=", whose groups overlap")
    return level


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
        return on(low, "bounds", policy, device), on(high, "bounds", policy, device)
    numbers = _read_bounds(bounds, policy)
    _check_bounds(numbers, policy)
    return numbers


def _two(bounds: Any, policy: Policy) -> tuple[Any, Any]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise refusal("bounds", policy, bounds)
    return bounds[0], bounds[1]


def _real(value: Any, field: str, policy: Policy, shape: tuple[int, ...] = ()) -> Any:
    """``value``: a real tensor with one element, or of ``shape``, or a Python number; ValueError for anything else."""
    if isinstance(value, Tensor):
        real = value.dtype.is_floating_point or not (
            value.is_complex() or (value.dtype == torch.bool and field not in MAY_BE_BOOL)
        )
        if (value.numel() == 1 or value.shape == shape) and real and is_dense(value):
            return value
    elif getattr(value, "shape", None) == ():  # NumPy's
        value = value.item()
    if isinstance(value, Real) and (field in MAY_BE_BOOL or not isinstance(value, bool)):
        return value
    raise refusal(field, policy, value, shape=shape)


def _read(value: Any, field: str, policy: Policy) -> float:
    one = _real(value, field, policy)
    return float(one.item() if isinstance(one, Tensor) else one)


def on(value: Any, field: str, policy: Policy, device: torch.device, shape: tuple[int, ...] = ()) -> Tensor:
    """``value`` on ``device``, float64 of ``shape``; for units in memory that no policy writes to later."""
    real = _real(value, field, policy, shape)
    if not isinstance(real, Tensor):
        return torch.full(shape, float(real), dtype=torch.float64, device=device)
    number = sent(real.detach(), device)
    if not shape:
        return number.double().reshape(())
    each = number.reshape(()) if number.numel() == 1 else number
    return torch.empty(shape, dtype=torch.float64, device=device).copy_(each)


def _like(own: Tensor, value: Any, name: str, policy: Policy) -> Tensor:
    """``value`` as the successor of ``own`` in the state; ValueError if it does not fit."""
    if not is_dense(value) or value.shape != own.shape or value.dtype != own.dtype:
        raise other_state(policy, name, value, own)
    tensor: Tensor = value.detach() if value.requires_grad else value
    return tensor
