"""Outcome: what a Clipper makes of one measured step, on the host or on an accelerator without waiting for it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import isfinite, nan

import torch
from torch import Tensor
from torch.optim import Optimizer

from .folding import Folds, folded
from .measured import Measured
from .policies import Policy, State
from .report import Culprit, Report
from .words import clip_coef, presented

LEAST_FOLDED = 2.95e-39  # below, 1 / coef is inf in float32


@dataclass(frozen=True, slots=True)
class Outcome:
    """One measured and decided step.

    ``norm`` and what follows are numbers where the host knows them, 0-d tensors otherwise.
    """

    report: Report
    measured: Measured
    bounds: tuple[float, float] | None
    norm: float | Tensor
    disagree: bool | Tensor
    coef: float | Tensor
    skip: bool | Tensor

    @property
    def scales(self) -> bool:
        """Whether gradients may have to be scaled: false only where the host knows a coefficient of 1."""
        return isinstance(self.coef, Tensor) or self.coef != 1.0

    @property
    def can_fold(self) -> bool:
        """Whether an optimizer may do the scaling, by dividing by 1 / coef, which must be finite in float32.

        Elementwise bounds come after it, and no optimizer applies them.
        """
        return self.scales and self.bounds is None and (isinstance(self.coef, Tensor) or self.coef > LEAST_FOLDED)

    def read(self) -> "Outcome":
        """The same with numbers in place of tensors: one copy to the host, and a wait for it."""
        if not isinstance(self.norm, Tensor):
            return self
        reduced = self.measured.reduced
        words = (self.norm, self.disagree, self.coef, self.skip, self.norm if reduced.own is None else reduced.own)
        norm, disagree, coef, skip, own = torch.stack([torch.as_tensor(word).double() for word in words]).tolist()
        if reduced.own is not None:
            reduced = replace(reduced, own=own)
        measured = replace(self.measured, reduced=reduced)
        return replace(self, measured=measured, norm=norm, disagree=bool(disagree), coef=coef, skip=bool(skip))

    def blamed_on(self, culprit: Culprit) -> "Outcome":
        """The same with the culprit in its report. Finite gradients whose powers overflow are left as they are."""
        coef = 1.0 if culprit.kind == "overflow" else self.coef
        report = replace(self.report, coef=torch.full_like(self.report.coef, float(coef)), culprit=culprit)
        return replace(self, report=report, coef=coef)


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
    decision, state = policy.decide(torch.scalar_tensor(norm, dtype=torch.float64, device=device), state)
    skip = decision.skip is not None and bool(decision.skip)
    skip = skip or (skips_nonfinite and not isfinite(norm))
    bound = decision.max_norm.item()
    dtype = measured.dtype
    coef = torch.ones((), dtype=dtype) if skip else clip_coef(norm, bound, dtype)
    report = Report(presented(norm, dtype), presented(bound, dtype), coef, torch.scalar_tensor(skip, dtype=torch.bool))
    return Outcome(report, measured, decision.bounds, norm, disagree, coef.item(), skip), state


def _with_tensors(
    measured: Measured, policy: Policy, state: State, skips_nonfinite: bool, device: torch.device
) -> tuple[Outcome, State]:
    norm, disagree = measured.reduced.tensors(device)
    norm = torch.where(disagree, torch.nan, norm)
    decision, state = policy.decide(norm, state)
    skip = torch.zeros_like(disagree) if decision.skip is None else decision.skip.clone()
    if skips_nonfinite:
        skip = skip | ~norm.isfinite()
    dtype = measured.dtype
    coef = torch.where(skip, 1.0, clip_coef(norm, decision.max_norm, dtype))
    bound = presented(decision.max_norm.clone(), dtype)  # a policy may answer with its state, which is about to change
    report = Report(presented(norm, dtype), bound, coef, skip)
    never = decision.skip is None and not skips_nonfinite
    return Outcome(report, measured, decision.bounds, norm, disagree, coef, False if never else skip), state
