"""Outcome: what a policy decides on one measured step, on the host, or on an accelerator without a host sync."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, nan

import torch
from torch import Tensor

from ..kernels import clamp_, scale_
from ..plan.build import Plan
from ..plan.measured import Measured
from ..plan.slots import Slots
from ..policies import Policy, State, Statistic, Statistics, Units
from ..policies.answer import Numbers, Tensors, ask
from ..policies.coefficient import clip_coef_on_device, factors, presented, presented_on_device, rounded
from ..policies.statistic import MODEL
from ..policies.trust import is_trusted
from ..report import Culprit, Report
from ..shield import shielded
from . import refusals
from .by_unit import factors_on_device, factors_on_host, statistics_of, watched


@dataclass(frozen=True, slots=True)
class Outcome:
    """One measured and decided step. Numbers where the host knows them, 0-d tensors otherwise.

    * ``clamp``: low and high, for every element; ``factors``: by which gradients are multiplied, one after the other.
    * ``disagree``: whether ranks made different calls, and the norm means nothing.
    * ``coef``: the coefficient; not yet rounded to the report's dtype where the bound is a tensor.
    * ``fault``: what is wrong with the policy's answer, where only the device has checked it; see
      :meth:`.policies.answer.Tensors.fault`.
    * ``max_norm``: the number that torch's formula clips to, where the host knows it.
    * ``by_slot``: factors of a decision by unit, (slots,) each, applied one after the other; ``coef`` is then what the
      norm of the model is multiplied by. ``slots``: of the plan.
    """

    report: Report
    measured: Measured
    clamp: tuple[float, float] | tuple[Tensor, Tensor] | None
    factors: tuple[Tensor, ...]
    norm: float | Tensor
    disagree: bool | Tensor
    coef: float | Tensor
    skip: bool | Tensor
    fault: float | Tensor | None = None
    max_norm: float | None = None
    by_slot: tuple[Tensor, ...] = ()
    slots: Slots | None = None

    def read(self) -> "Outcome":
        """The same with numbers in place of tensors: one copy to the host, which is a host sync."""
        assert isinstance(self.norm, Tensor)
        reduced = self.measured.reduced
        own = self.norm if reduced.own is None else reduced.own
        fault = 0.0 if self.fault is None else self.fault
        numbers = (self.norm, self.disagree, self.coef, self.skip, fault, own, reduced.drift)
        read = torch.stack([_like(number, self.norm) for number in numbers]).tolist()
        norm, disagree, coef, skip, fault, own, drift = read
        reduced = replace(reduced, own=None if reduced.own is None else own, drift=bool(drift))
        measured = replace(self.measured, reduced=reduced)
        found: tuple[Tensor, ...] = ()
        if coef != 1.0 and not self.by_slot:
            bound, given = (inf, coef) if self.max_norm is None else (self.max_norm, None)
            found = factors(norm, bound, given, measured.dtype)[1]
        found = self.factors if len(found) == 1 else found  # the same number, already on the gradients' device
        known = replace(self, measured=measured, factors=found, norm=norm, disagree=bool(disagree), coef=coef)
        return replace(known, skip=bool(skip), fault=fault)

    @property
    def gradients(self) -> Sequence[Tensor]:
        """What was measured, as plain tensors that share its memory: for :meth:`apply_to`. Kept alive by this."""
        by_piece = self.measured.by_piece
        return by_piece.parts if self.by_slot and by_piece is not None else self.measured.runs

    def without_gradients(self) -> "Outcome":
        """The same, but it keeps no gradient alive."""
        return replace(self, measured=self.measured.without_gradients())

    def scaled_by_unit(self) -> "Outcome":
        """The same once :meth:`apply_to` may be handed other tensors than ``gradients``, such as one flat buffer.

        Where units have factors of their own, ``gradients`` are scaled and clamped now, and rounded to their dtype;
        what is left is to unscale them.
        """
        if not self.by_slot:
            return self
        self.apply_to(self.gradients)
        return replace(self, by_slot=(), clamp=None)

    @shielded
    def apply_to(self, gradients: Sequence[Tensor], unscale: bool = False) -> None:
        """Scale and clamp ``gradients`` in place; nothing if the step is skipped.

        * ``gradients``: plain tensors (the local tensor of a DTensor), still multiplied by ``scale()`` of the
          :class:`.Storage` as it was when they were measured.
        * ``unscale``: divide them by that too.
        """
        scale = self.measured.scale
        if unscale and scale != 1.0 and self.skip is not True:
            scale_(gradients, 1 / scale)
            scale = 1.0
        self.change(gradients, scale)

    def change(self, gradients: Sequence[Tensor], scale: float) -> None:
        """Scale and clamp ``gradients``, which are multiplied by ``scale`` and stay so, inside a shielded call.

        Changes nothing where the step is skipped: a ``skip`` that is a tensor comes with a coefficient of 1. A host
        sync only for gradients on the host, where the decision is on an accelerator.
        """
        if self.skip is True:
            return
        for factor in self.factors:
            scale_(gradients, factor)
        if self.by_slot:
            self._scale_by_unit(gradients)
        if self.clamp is not None:
            unless = self.skip if isinstance(self.skip, Tensor) else None
            low, high = self.clamp if scale == 1.0 else (self.clamp[0] * scale, self.clamp[1] * scale)
            clamp_(gradients, low, high, unless)

    def _scale_by_unit(self, gradients: Sequence[Tensor]) -> None:
        measured = self.measured.by_piece
        assert measured is not None
        assert self.slots is not None
        if len(gradients) != len(measured.indices):
            raise refusals.by_unit_of_others(len(gradients), len(measured.indices))
        if gradients is not measured.parts:  # which may be of other sizes
            measured = measured._replace(parts=gradients, table=None)
        for each in self.by_slot:
            self.slots.scale_(measured, each)

    def blamed_on(self, culprit: Culprit) -> "Outcome":
        """The same with the culprit in its report."""
        report = replace(self.report, culprit=culprit)
        if culprit.kind == "overflow":  # only the sum did: all gradients are finite, and the formula would zero them
            report = replace(report, coef=torch.ones_like(report.coef))
            return replace(self, report=report, factors=(), by_slot=(), coef=1.0)
        return replace(self, report=report)


def _like(number: float | Tensor, other: Tensor) -> Tensor:
    return number.double() if isinstance(number, Tensor) else torch.full_like(other, number)


def decided_on_host(
    measured: Measured,
    policy: Policy,
    state: State,
    skips_nonfinite: bool,
    plan: Plan,
    units: Units,
    watch: Statistic | None,
    trusted: bool,
) -> tuple[Outcome, State]:
    """What ``policy`` decides, in numbers, and its state after that. Where ranks disagree the norm is NaN.

    ``watch``: what is reported beside that. ``trusted``: the policy's answers keep the rules by construction.
    """
    reduced = measured.reduced
    assert not isinstance(reduced.norm, Tensor)
    disagree = bool(reduced.disagree)
    norm = nan if disagree else reduced.norm
    asked = torch.scalar_tensor(norm, dtype=torch.float64, device=plan.device)
    plain = reduced.sums is None  # nothing travelled but the norm of the model
    statistics = Statistics(asked, units) if plain else statistics_of(measured, asked, units, plan)
    decision, state = policy.decide(statistics, state) if trusted else ask(policy, statistics, state)
    answer, finite, dtype = Numbers.of(decision, policy, statistics), isfinite(norm), measured.dtype
    skip = answer.skip or (skips_nonfinite and not finite)
    norms, zeros = watched(statistics, watch, dtype)
    if not skip:
        answer.check(policy, statistics, finite)
    skipped, shown, bound, given = (
        torch.scalar_tensor(skip, dtype=torch.bool),
        presented(norm, dtype),
        answer.max_norm,
        answer.coef,
    )
    if answer.per is not MODEL:
        by_slot, ratio = factors_on_host(answer, statistics, skip, dtype)
        report = Report(shown, presented(inf, dtype), ratio, skipped, norms=norms, extra=decision.extra, zeros=zeros)
        outcome = Outcome(report, measured, answer.bounds, (), norm, disagree, ratio.item(), skip)
        return replace(outcome, by_slot=by_slot, slots=plan.slots), state
    assert not isinstance(bound, Tensor)
    assert not isinstance(given, Tensor)
    coef, found = (torch.ones((), dtype=dtype), ()) if skip else factors(norm, bound, given, dtype)
    report = Report(shown, presented(bound, dtype), coef, skipped, norms=norms, extra=decision.extra, zeros=zeros)
    return Outcome(report, measured, answer.bounds, found, norm, disagree, coef.item(), skip), state


def decided_on_device(
    measured: Measured,
    policy: Policy,
    state: State,
    skips_nonfinite: bool,
    plan: Plan,
    units: Units,
    watch: Statistic | None,
    last: Report | None,
) -> tuple[Outcome, State]:
    """The same in a few kernels on one number each, without a host sync.

    ``last``: the previous report, whose ``max_norm`` is reused where the bound is a number.
    """
    device = plan.device
    norm, dtype, trusted = measured.reduced.tensor(device), measured.dtype, is_trusted(policy)
    # A policy of a user may write to the norm that it is shown.
    asked, plain = norm if trusted else norm.clone(), measured.reduced.sums is None
    statistics = Statistics(asked, units) if plain else statistics_of(measured, asked, units, plan)
    decision, state = ask(policy, statistics, state)
    answer, finite = Tensors.of(decision, policy, statistics, device), norm < inf  # false for NaN too
    skip = _skipped(answer.skip, finite, skips_nonfinite)
    shown = norm
    fault: Tensor | None = None
    if not trusted:
        ignored = skip | ~finite if answer.per is MODEL else skip
        fault = torch.where(ignored, 0.0, answer.fault(statistics, finite))
        is_bad = fault > 0
        skip, shown = skip | is_bad, torch.where(is_bad, torch.nan, norm)
    never = answer.skip is None and not skips_nonfinite and trusted
    known, (norms, zeros) = False if never else skip, watched(statistics, watch, dtype)
    shown = presented_on_device(shown, finite, dtype)
    disagree = measured.reduced.disagree
    if answer.per is not MODEL:
        by_slot, ratio = factors_on_device(answer, statistics, skip, dtype)
        report = Report(
            shown, _shown(inf, dtype, device, last), ratio, skip, norms=norms, extra=decision.extra, zeros=zeros
        )
        outcome = Outcome(report, measured, answer.bounds, (), norm, disagree, ratio, known, fault)
        return replace(outcome, by_slot=(by_slot,), slots=plan.slots), state
    bound = answer.max_norm if isinstance(answer.max_norm, float) and answer.coef is None else None
    exact, coef = _coefs(answer, norm, finite, skip, dtype, skips_nonfinite)
    report = Report(
        shown, _shown(answer.max_norm, dtype, device, last), coef, skip, norms=norms, extra=decision.extra, zeros=zeros
    )
    found = () if bound == inf else (coef,)
    return Outcome(report, measured, answer.bounds, found, norm, disagree, exact, known, fault, bound), state


def _skipped(wanted: Tensor | None, finite: Tensor, skips_nonfinite: bool) -> Tensor:
    if not skips_nonfinite:
        return torch.zeros_like(finite) if wanted is None else wanted
    return ~finite if wanted is None else wanted | ~finite


def _coefs(
    answer: Tensors, norm: Tensor, finite: Tensor, skip: Tensor, dtype: torch.dtype, skips_nonfinite: bool
) -> tuple[Tensor, Tensor]:
    """The coefficient as exactly as it is known here, and as a report shows it; 1 where the step is skipped.

    For a norm of inf that something bounds it is 0, as in torch.
    """
    if answer.coef is None and isinstance(answer.max_norm, float):
        if answer.max_norm == inf:
            coef = torch.ones((), dtype=dtype, device=norm.device)
        else:
            coef = clip_coef_on_device(norm, answer.max_norm, dtype)
            coef = (coef if skips_nonfinite else coef.mul_(finite)).masked_fill_(skip, 1.0)
        return coef, coef
    exact = _exact(norm, answer).masked_fill_(skip, 1.0)
    coef = rounded(exact, dtype)
    return exact, coef if skips_nonfinite else torch.where(norm == inf, exact.to(dtype), coef)


def _exact(norm: Tensor, answer: Tensors) -> Tensor:
    """In memory of its own, which is then written to."""
    if answer.coef is not None:
        return answer.coef if answer.trusted else answer.coef.clone()
    assert isinstance(answer.max_norm, Tensor)
    return (answer.max_norm / (norm + 1e-6)).clamp_(max=1.0).masked_fill_(answer.max_norm == inf, 1.0)


def _shown(bound: Tensor | float, dtype: torch.dtype, device: torch.device, last: Report | None) -> Tensor:
    if isinstance(bound, Tensor):
        return presented_on_device(bound, bound < inf, dtype)
    if last is not None and last.max_norm.dtype == dtype:
        return last.max_norm
    return torch.full((), presented(bound, dtype).item(), dtype=dtype, device=device)
