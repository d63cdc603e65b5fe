"""Outcome: what a Clipper makes of one measured step, on the host or on an accelerator without waiting for it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import inf, isfinite, nan

import torch
from torch import Tensor
from torch.optim import Optimizer

from .folding import Folds, folded
from .measured import Measured
from .policies import Policy, State
from .policies.answer import Numbers, Words, ask, is_trusted
from .report import Culprit, Report
from .words import clip_coef, factors, least_normal, presented


@dataclass(frozen=True, slots=True)
class Outcome:
    """One measured and decided step.

    ``factors``: what gradients are multiplied by, one after the other. ``norm`` and what follows are numbers where the
    host knows them, 0-d tensors otherwise: ``coef`` before it was rounded, and what is wrong with the policy's answer
    that the host has not refused (see :meth:`.policies.answer.Words.fault`).
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

    @property
    def can_fold(self) -> bool:
        """Whether an optimizer may do the scaling, by dividing by 1 / coef: one factor, and normal in float32.

        Elementwise bounds come after it, and no optimizer applies them.
        """
        return len(self.factors) == 1 and self.bounds is None

    def read(self) -> "Outcome":
        """The same with numbers in place of tensors: one copy to the host, and a wait for it."""
        if not isinstance(self.norm, Tensor):
            return self
        reduced = self.measured.reduced
        own = self.norm if reduced.own is None else reduced.own
        words = (self.norm, self.disagree, self.coef, self.skip, 0.0 if self.fault is None else self.fault, own)
        norm, disagree, coef, skip, fault, own = torch.stack([_like(word, self.norm) for word in words]).tolist()
        if reduced.own is not None:
            reduced = replace(reduced, own=own)
        measured = replace(self.measured, reduced=reduced)
        found = factors(norm, inf, coef, measured.dtype)[1]
        found = self.factors if len(found) == 1 else found  # which is where gradients are
        known = replace(self, measured=measured, factors=found, norm=norm, disagree=bool(disagree), coef=coef)
        return replace(known, skip=bool(skip), fault=fault)

    def blamed_on(self, culprit: Culprit) -> "Outcome":
        """The same with the culprit in its report. Finite gradients whose powers overflow are left as they are."""
        report = replace(self.report, culprit=culprit)
        if culprit.kind == "overflow":
            report = replace(report, coef=torch.ones_like(report.coef))
            return replace(self, report=report, factors=(), coef=1.0)
        return replace(self, report=report)


@dataclass(frozen=True, slots=True)
class Stepping:
    """A decision whose gradients are scaled already, but for those that folding optimizers scale themselves."""

    outcome: Outcome
    folds: Folds
    coef: Tensor | None
    skip: Tensor | None

    def around(self, index: int, optimizer: Optimizer) -> AbstractContextManager[None]:
        """What the step of ``optimizer``, the one of this index, must run inside of."""
        return folded(optimizer, self.coef, self.skip) if self.folds.by_optimizer[index] else nullcontext()


def _like(word: float | Tensor, other: Tensor) -> Tensor:
    return word.double() if isinstance(word, Tensor) else torch.full_like(other, word)


def decided(
    measured: Measured, policy: Policy, state: State, skips_nonfinite: bool, device: torch.device, on_host: bool
) -> tuple[Outcome, State]:
    """What ``policy`` decides, and its state after it. Where ranks disagree the norm is NaN.

    ``on_host``: with numbers, since reading them costs nothing; otherwise nothing waits for ``device``.
    """
    decide = _with_numbers if on_host else _with_tensors
    return decide(measured, policy, state, skips_nonfinite, device)


def _with_numbers(
    measured: Measured, policy: Policy, state: State, skips_nonfinite: bool, device: torch.device
) -> tuple[Outcome, State]:
    norm, disagree, _ = measured.reduced.read()
    norm = nan if disagree else norm
    decision, state = ask(policy, torch.scalar_tensor(norm, dtype=torch.float64, device=device), state)
    answer, finite, dtype = Numbers.of(decision, policy), isfinite(norm), measured.dtype
    if finite and not answer.skip:  # of a norm that is not finite a policy may have made what it cannot answer for
        answer.check(policy)
    skip, bound = answer.skip or (skips_nonfinite and not finite), answer.max_norm
    coef, found = (torch.ones((), dtype=dtype), ()) if skip else factors(norm, bound, answer.coef, dtype)
    report = Report(presented(norm, dtype), presented(bound, dtype), coef, torch.scalar_tensor(skip, dtype=torch.bool))
    return Outcome(report, measured, answer.bounds, found, norm, disagree, coef.item(), skip), state


def _with_tensors(
    measured: Measured, policy: Policy, state: State, skips_nonfinite: bool, device: torch.device
) -> tuple[Outcome, State]:
    norm, disagree = measured.reduced.tensors(device)
    norm, trusted = torch.where(disagree, torch.nan, norm), is_trusted(policy)
    decision, state = ask(policy, norm if trusted else norm.clone(), state)
    answer, dtype = Words.of(decision, policy, device), measured.dtype
    skip = torch.zeros_like(disagree) if answer.skip is None else answer.skip
    if skips_nonfinite:
        skip = skip | ~norm.isfinite()
    shown: Tensor = norm
    fault: Tensor | None = None
    if not trusted:
        fault = torch.where(skip | ~norm.isfinite(), 0.0, answer.fault())
        skip = skip | (fault > 0)
        shown = torch.where(fault > 0, torch.nan, norm)
    exact = clip_coef(norm, answer.max_norm, torch.float64) if answer.coef is None else answer.coef
    exact = torch.where(skip, 1.0, exact)
    coef = least_normal(exact, None if skips_nonfinite else norm).to(dtype)
    bound = presented(answer.max_norm.clone(), dtype)  # a policy may keep what it answers with, and change it
    report = Report(presented(shown, dtype), bound, coef, skip)
    never = answer.skip is None and not skips_nonfinite and trusted
    known = False if never else skip
    return Outcome(report, measured, answer.bounds, (coef,), norm, disagree, exact, known, fault), state
