"""Outcome: what a Clipper makes of one measured step, on the host or on an accelerator without waiting for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, nan

import torch
from torch import Tensor

from ..kernels import clamp_, scale_
from ..plan.measured import Measured
from ..policies import Policy, State
from ..policies.answer import Numbers, Words, ask, is_trusted
from ..policies.coefficient import clip_coef_on_device, factors, presented, presented_on_device, rounded
from ..report import Culprit, Report


@dataclass(frozen=True, slots=True)
class Outcome:
    """One measured and decided step.

    ``factors``: what gradients are multiplied by, one after the other. ``norm`` and what follows are numbers where the
    host knows them, 0-d tensors otherwise: ``coef`` before it was rounded where no number bounds the norm, and what is
    wrong with the policy's answer that the host has not refused (see :meth:`.policies.answer.Words.fault`).
    ``bound``: the number that torch's formula clips to, where the host knows it.
    """

    report: Report
    measured: Measured
    bounds: tuple[float, float] | tuple[Tensor, Tensor] | None
    factors: tuple[Tensor, ...]
    norm: float | Tensor
    disagree: bool | Tensor
    coef: float | Tensor
    skip: bool | Tensor
    fault: float | Tensor | None = None
    bound: float | None = None

    def read(self) -> "Outcome":
        """The same with numbers in place of tensors: one copy to the host, and a host sync."""
        assert isinstance(self.norm, Tensor)
        reduced = self.measured.reduced
        own = self.norm if reduced.own is None else reduced.own
        words = (self.norm, self.disagree, self.coef, self.skip, 0.0 if self.fault is None else self.fault, own)
        norm, disagree, coef, skip, fault, own = torch.stack([_like(word, self.norm) for word in words]).tolist()
        if reduced.own is not None:
            reduced = replace(reduced, own=own)
        measured = replace(self.measured, reduced=reduced)
        found: tuple[Tensor, ...] = ()
        if coef != 1.0:
            known_to, told = (inf, coef) if self.bound is None else (self.bound, None)
            found = factors(norm, known_to, told, measured.dtype)[1]
        found = self.factors if len(found) == 1 else found  # which is where gradients are
        known = replace(self, measured=measured, factors=found, norm=norm, disagree=bool(disagree), coef=coef)
        return replace(known, skip=bool(skip), fault=fault)

    def apply_to(self, gradients: Sequence[Tensor]) -> None:
        """Scale and clamp ``gradients``, plain tensors, in place; with numbers on the host only where that is needed.

        Nothing where the step is skipped, or may be by a tensor that is not read here.
        """
        if self.skip is True:
            return
        for factor in self.factors:
            scale_(gradients, factor)
        if self.bounds is not None:
            unless = self.skip if isinstance(self.skip, Tensor) else None
            low, high = self.bounds
            clamp_(gradients, low, high, unless)

    def blamed_on(self, culprit: Culprit) -> "Outcome":
        """The same with the culprit in its report. Finite gradients whose powers overflow are left as they are."""
        report = replace(self.report, culprit=culprit)
        if culprit.kind == "overflow":
            report = replace(report, coef=torch.ones_like(report.coef))
            return replace(self, report=report, factors=(), coef=1.0)
        return replace(self, report=report)


def _like(word: float | Tensor, other: Tensor) -> Tensor:
    return word.double() if isinstance(word, Tensor) else torch.full_like(other, word)


def decided_on_host(
    measured: Measured, policy: Policy, state: State, skips_nonfinite: bool, device: torch.device, trusted: bool
) -> tuple[Outcome, State]:
    """What ``policy`` decides, in numbers, and its state after it. Where ranks disagree the norm is NaN.

    ``trusted``: whether the policy's answers keep the rules by construction.
    """
    reduced = measured.reduced
    assert not isinstance(reduced.norm, Tensor)
    disagree = bool(reduced.disagree)
    norm = nan if disagree else reduced.norm
    asked = torch.scalar_tensor(norm, dtype=torch.float64, device=device)
    decision, state = policy.decide(asked, state) if trusted else ask(policy, asked, state)
    answer, finite, dtype = Numbers.of(decision, policy), isfinite(norm), measured.dtype
    if finite and not answer.skip:  # of a norm that is not finite a policy may have made what it cannot answer for
        answer.check(policy)
    skip, bound = answer.skip or (skips_nonfinite and not finite), answer.max_norm
    coef, found = (torch.ones((), dtype=dtype), ()) if skip else factors(norm, bound, answer.coef, dtype)
    report = Report(presented(norm, dtype), presented(bound, dtype), coef, torch.scalar_tensor(skip, dtype=torch.bool))
    return Outcome(report, measured, answer.bounds, found, norm, disagree, coef.item(), skip), state


def decided_on_device(
    measured: Measured,
    policy: Policy,
    state: State,
    skips_nonfinite: bool,
    device: torch.device,
    last: Report | None,
) -> tuple[Outcome, State]:
    """The same in a few kernels on one number each, for which nothing waits: one asks whether the norm is finite.

    ``last``: the report before, with a bound that need not be made again where it is a number.
    """
    norm, dtype, trusted = measured.reduced.tensor(device), measured.dtype, is_trusted(policy)
    decision, state = ask(policy, norm if trusted else norm.clone(), state)
    answer, finite = Words.of(decision, policy, device), norm < inf  # false for NaN too
    skip = _skipped(answer.skip, finite, skips_nonfinite)
    shown: Tensor = norm
    fault: Tensor | None = None
    if not trusted:
        fault = torch.where(skip | ~finite, 0.0, answer.fault())
        skip = skip | (fault > 0)
        shown = torch.where(fault > 0, torch.nan, norm)
    never = answer.skip is None and not skips_nonfinite and trusted
    bound = answer.max_norm if isinstance(answer.max_norm, float) and answer.coef is None else None
    exact, coef = _coefs(answer, norm, finite, skip, dtype, skips_nonfinite)
    report = Report(presented_on_device(shown, finite, dtype), _shown(answer.max_norm, dtype, device, last), coef, skip)
    found, known = () if bound == inf else (coef,), False if never else skip
    return Outcome(
        report, measured, answer.bounds, found, norm, measured.reduced.disagree, exact, known, fault, bound
    ), state


def _skipped(wanted: Tensor | None, finite: Tensor, skips_nonfinite: bool) -> Tensor:
    if not skips_nonfinite:
        return torch.zeros_like(finite) if wanted is None else wanted
    return ~finite if wanted is None else wanted | ~finite


def _coefs(
    answer: Words, norm: Tensor, finite: Tensor, skip: Tensor, dtype: torch.dtype, skips_nonfinite: bool
) -> tuple[Tensor, Tensor]:
    """The coefficient as exactly as it is known here, and as a report shows it; 1 where the step is skipped.

    Of a norm that is inf it is 0 where something bounds it, as in torch.
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


def _exact(norm: Tensor, answer: Words) -> Tensor:
    """In memory of its own."""
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
