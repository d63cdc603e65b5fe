"""Statistics for a policy, and decisions by unit: a factor for each slot, and one coefficient to report.

The words: [Note: units and slots] in policies/statistics.py.
"""

from collections.abc import Mapping
from ctypes import string_at
from functools import reduce
from math import inf
from zlib import crc32

import torch
from torch import Tensor

from ..plan.build import Plan
from ..plan.measured import Measured
from ..policies.answer import Numbers, Tensors
from ..policies.coefficient import LEAST, MOST, all_presented
from ..policies.statistic import Statistic
from ..policies.statistics import Statistics
from ..policies.units import Units
from ..report import Watched

NO_UNITS = Units()


def units_of(plan: Plan) -> Units:
    """What the statistics of a policy are of."""
    if plan.slots is not None:
        return plan.slots.units
    return NO_UNITS if plan.p == 2 else Units(p=plan.p)


def statistics_of(measured: Measured, norm: Tensor, units: Units, plan: Plan) -> Statistics:
    """What a policy sees of a measurement in which more than its ``norm``, 0-d float64, has travelled."""
    sums, slots = measured.reduced.sums, plan.slots
    assert sums is not None
    signals = dict(zip(plan.signals, sums[len(sums) - len(plan.signals) :], strict=True)) if plan.signals else {}
    if slots is None:
        return Statistics(norm, units, None, plan.p, measured.scale, signals)
    found = {"gradient": sums[: slots.count]}
    if slots.of_parameters:
        found["parameter"] = sums[slots.count : 2 * slots.count]
    if slots.of_zeros:
        found["zeros"] = sums[slots.length - slots.count : slots.length]
    return Statistics(norm, units, found, plan.p, measured.scale, signals)


def watched(
    statistics: Statistics, watch: Statistic | None, dtype: torch.dtype
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The norms that a report shows by name, and the shares of zeros, where they are counted."""
    if watch is None:
        return {}, {}
    names, shares = statistics.units.names(watch), statistics.zeros(watch)
    norms = Watched(names, all_presented(statistics.norm(watch), dtype))
    return norms, {} if shares is None else Watched(names, shares.to(dtype))


def factors_on_host(
    answer: Numbers | Tensors, statistics: Statistics, skip: bool, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Factors for slots, (slots,) each, applied one after the other; and what the norm is multiplied by, 0-d."""
    if skip:
        return (), torch.ones((), dtype=dtype)
    coefs = _by_slot(answer, statistics)
    return _normal_factors(coefs, dtype), _reported(coefs, statistics, dtype)


def factors_on_device(
    answer: Numbers | Tensors, statistics: Statistics, skip: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same on an accelerator, where the host does not know how many factors it takes: one, ``LEAST`` to ``MOST``.

    Where ``skip`` is true all are 1.
    """
    coefs = _by_slot(answer, statistics)
    coefs = torch.where(coefs > 0, coefs.clamp(LEAST, MOST), coefs).masked_fill_(skip, 1.0)
    return coefs.to(dtype), _reported(coefs, statistics, dtype)


def code_of(factors: tuple[Tensor, ...]) -> int:
    """A number that is equal where factors on the host are: for ranks to compare what they decided."""
    assert all(map(Tensor.is_contiguous, factors))
    return reduce(lambda code, each: crc32(string_at(each.data_ptr(), each.nbytes), code), factors, 0)


def _by_slot(answer: Numbers | Tensors, statistics: Statistics) -> Tensor:
    """The coefficient of each slot, (slots,) float64; 1 for those in no unit."""
    coefs, bound = answer.coef, answer.max_norm
    if coefs is None:
        every = bound if isinstance(bound, Tensor) else torch.scalar_tensor(bound, dtype=torch.float64)
        coefs = (every / (statistics.norm(answer.per) + 1e-6)).clamp_(max=1.0).masked_fill_(every == inf, 1.0)
    assert isinstance(coefs, Tensor)
    return statistics.units.by_slot(answer.per, coefs)


def _normal_factors(coefs: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """``coefs`` as factors from ``LEAST`` to ``MOST``, or 0, inf and NaN; none where all are 1.

    See :func:`.coefficient.factors`.
    """
    low, high = (each.item() for each in coefs.aminmax()) if len(coefs) else (1.0, 1.0)  # both NaN where one is
    if LEAST <= low <= high <= MOST:  # nearly always
        last = coefs.to(dtype)
        return () if max(1 - low, high - 1) < 1e-6 and bool((last == 1).all()) else (last,)
    found = []
    while bool((outside := (coefs.clamp(LEAST, MOST) != coefs) & (coefs > 0) & (coefs < inf)).any()):
        powers = torch.where(outside, coefs.clamp(LEAST, MOST), 1.0)  # of two, which round nothing
        found.append(powers.to(dtype))
        coefs = coefs / powers
    last = coefs.to(dtype)
    return (*found, last) if found or not bool((last == 1).all()) else ()


def _reported(coefs: Tensor, statistics: Statistics, dtype: torch.dtype) -> Tensor:
    """What the norm of the model is multiplied by, 0-d, at least ``LEAST`` and finite."""
    return statistics.shrunk(coefs).clamp(LEAST, torch.finfo(dtype).max).to(dtype)
