"""Engine: what a Clipper does, for the loop, the framework or the optimizer that makes its calls."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from math import isfinite
from typing import Any, Concatenate, ParamSpec, TypeVar, Unpack

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..errors import LayoutError, NonFiniteError
from ..gradients.storage import GradientFn, Storage
from ..layouts.model import Inventory
from ..optimizers.fused import Folding, Folds, Stepping, prepare_skip_on_device
from ..optimizers.hooks import check_optimizers, skip_next_step, watch_before_step
from ..optimizers.scaler import claim, join_found_inf, unscale_
from ..policies import Policy
from ..report import Fingerprint, Report
from ..shield import shielded
from . import refusals
from .building import build
from .decision import Outcome
from .interruption import Interruption
from .joining import joinable_in, refuse_join
from .options import Keywords
from .owner import Owner
from .signals import Signals

P = ParamSpec("P")
R = TypeVar("R")


def _tells(verb: Callable[Concatenate["Engine", P], R]) -> Callable[Concatenate["Engine", P], R]:
    """``verb``; where an exception leaves it on this rank alone, the others do not wait for this one."""

    @wraps(verb)
    def call(self: "Engine", *args: P.args, **kwargs: P.kwargs) -> R:
        self.progress.committed = False
        try:
            return verb(self, *args, **kwargs)
        except BaseException as error:
            self.interruption.leave(verb.__name__, error, self.progress.committed)
            raise

    return call  # type: ignore[return-value]  # mypy wants the name self of a Callable, which has none


class Engine:
    """Everything behind the face of a :class:`Clipper`, whose arguments it takes.

    * ``gradients``: also a :class:`Storage` of the gradients of all parameters, each once, in the model's order.
    * ``decides_on_device``: whether the decision stays where the norm is reduced; None: where reading it would be a
      host sync. (True makes the CPU decide as accelerators do.)

    Its verbs know more than those of a Clipper about whoever steps:

    * ``measure(optimizers)``: norm and decision, and no step.
    * ``clip_(optimizers, scaler)``: clip now; the next step of each of ``optimizers``, called by someone else, changes
      nothing where the decision is to skip.
    * ``begin(optimizers, scaler)``: decide now, then ``step(index, optimizer)`` of what is returned, one by one; or
      inside its ``around(index, optimizer)``, where someone else calls the step. The scaler that steps must be given.
    * ``decide()``: decide now; ``Outcome.apply_to`` scales gradients later.
    * ``step(*optimizers, scaler)``: clip and step.

    ``only_theirs``: leave gradients that none of ``optimizers`` holds out of the norm, and as they are: nobody zeroes
    them. ``interruption.record(kind)``: an exception has kept this rank from a step that the other ranks have made.
    """

    @shielded
    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        policy: Policy | float,
        *,
        gradients: str | GradientFn | Storage | None = None,
        decides_on_device: bool | None = None,
        **keywords: Unpack[Keywords],
    ) -> None:
        built = build(model, policy, gradients=gradients, decides_on_device=decides_on_device, **keywords)
        self.progress = built.progress
        self.plan, self.policy, self.holders = built.progress.plan, built.progress.policy, built.holders
        self.owner = Owner(built.holders, built.everything)
        self._folding = Folding(self.owner.clipped, may_fold=built.progress.storage.in_grad)
        self._checked: Folds | None = None  # of the optimizers of the latest step()
        self._inventory, self._joinable = Inventory(built.parts, built.everything), joinable_in(built.parts)
        self.interruption = Interruption(self.plan.group, self.progress.calls)

    @shielded
    @_tells
    def measure(
        self, optimizers: Sequence[Optimizer] = (), only_theirs: bool = False, signals: Signals | None = None
    ) -> Report:
        """Norm and decision for the gradients as they are. See :meth:`Clipper.measure`."""
        counted = self._folding.of(optimizers).parameters if only_theirs else None
        return self.progress.preview(self._fault(), counted, signals).report

    @shielded
    @_tells
    def clip_(
        self,
        optimizers: Sequence[Optimizer] = (),
        scaler: GradScaler | None = None,
        only_theirs: bool = False,
        signals: Signals | None = None,
    ) -> Report:
        """Clip in place; the next step of each of ``optimizers`` changes nothing where the decision is to skip.

        With a ``scaler`` it unscales first. The scaler skips non-finite steps itself, and has to know of the policy's
        own skip before that, which is a host sync.
        """
        self.owner.register(optimizers)
        scaler, folds = _enabled(scaler), self._folding.of(optimizers)
        if not self.progress.storage.in_grad:  # which cannot be taken away from a step that is running
            watch_before_step(optimizers)
        outcome = self._advance(optimizers, folds, scaler, only_theirs, scaler is None, signals)
        outcome.change(outcome.gradients, outcome.measured.scale)
        report = outcome.report
        if optimizers:
            skip = report.skip if scaler is None else (report.skip & report.norm.isfinite()).cpu()
            skip_next_step(optimizers, skip)
        return report

    @shielded
    @_tells
    def begin(
        self,
        optimizers: Sequence[Optimizer],
        scaler: GradScaler | None = None,
        only_theirs: bool = False,
        folds: Folds | None = None,
        signals: Signals | None = None,
    ) -> Stepping:
        """Decide, and scale what ``optimizers`` will not scale themselves while they step.

        ``folds``: of these optimizers, if known.
        """
        if folds is None:
            self.owner.register(optimizers)
            folds = self._folding.of(optimizers)
        # An SGD may get momentum of zeros here, before anything is measured, and keeps it if this call raises.
        on_device = self.progress.on_device and all(folds.by_optimizer) and all(map(prepare_skip_on_device, optimizers))
        scaler = _enabled(scaler)
        outcome = self._advance(optimizers, folds, scaler, only_theirs, on_device, signals)
        # 8. Scale. An optimizer that folds divides by 1 / coef: one factor, and no clamping after it. The report's
        #    coefficient is that factor, the same tensor; outcome.coef may be a number, or be rounded otherwise.
        if len(outcome.factors) == 1 and outcome.clamp is None and outcome.skip is not True:
            gradients, coef = self._not_folded(outcome, folds), outcome.report.coef
        else:
            gradients, coef = outcome.gradients, None
        if gradients:
            outcome.change(gradients, outcome.measured.scale)
        skip_on_device = outcome.skip if isinstance(outcome.skip, Tensor) else None
        return Stepping(outcome.report, outcome.skip is True, folds, coef, skip_on_device, scaler)

    @shielded
    @_tells
    def decide(self, signals: Signals | None = None) -> Outcome:
        """Decide, and change nothing but the policy's state: :meth:`.decision.Outcome.apply_to` scales gradients later.

        A host sync on an accelerator, since the decision is in numbers. The outcome keeps the gradients alive.
        """
        return self._advance((), self._folding.of(()), None, only_theirs=False, skips_on_device=False, signals=signals)

    @_tells  # and not shielded: the optimizers step in the modes of the caller; begin() is shielded
    def step(self, *optimizers: Optimizer, scaler: GradScaler | None = None, signals: Signals | None = None) -> Report:
        """See :meth:`Clipper.step`."""
        # 1. Check the optimizers, if they are not those of the latest step or not torch's own: a framework's proxy that
        #    could be stepped then may accumulate now.
        folds = self._folding.known(optimizers)
        if folds is None or folds is not self._checked:
            self._check(optimizers, signals)
            self.owner.register(optimizers)
            folds = self._checked = self._folding.of(optimizers)
        # 2 to 8.
        stepping = self.begin(optimizers, scaler, folds=folds, signals=signals)
        # 9. Step, or not.
        for index, optimizer in enumerate(optimizers):
            stepping.step(index, optimizer)
        return stepping.report

    @shielded
    @_tells
    def fingerprint(self, optimizers: Sequence[Optimizer] = (), only_theirs: bool = False) -> Fingerprint:
        """See :meth:`Clipper.fingerprint`."""
        counted = self._folding.of(optimizers).parameters if only_theirs else None
        return self.progress.fingerprint(self._fault(), counted)

    @shielded
    @_tells
    def verify(self) -> None:
        """See :meth:`Clipper.verify`."""
        refuse_join(self._joinable)
        fault = self.owner.rivalry() or self._inventory.lost()
        self.progress.proofs.now(self.plan, fault)

    @shielded
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Clipper.load_state_dict`."""
        self.progress.load_state_dict(state)
        self.interruption.forget()

    def _fault(self) -> LayoutError | None:
        """What this rank knows to be wrong before it looks at a gradient, for all ranks to raise.

        RuntimeError inside ``join()``, where other ranks would not take part.
        """
        if self._joinable:
            refuse_join(self._joinable)
        return self.interruption.fault or self._inventory.lost()

    def _advance(
        self,
        optimizers: Sequence[Optimizer],
        folds: Folds,
        scaler: GradScaler | None,
        only_theirs: bool,
        skips_on_device: bool,
        signals: Signals | None = None,
        fault: LayoutError | None = None,
    ) -> Outcome:
        """Phases 2 to 7 of :meth:`Clipper.step`."""
        if folds.foreign and fault is None:
            fault = self.owner.foreign_to(folds, optimizers)
        if fault is None and self.progress.calls.proof_is_due():
            fault = self.owner.rivalry()
        counted = folds.parameters if only_theirs else None
        if scaler is None:
            return self.progress.advance(skips_on_device, self._fault() or fault, counted, signals)
        fault = fault or self._out_of_reach(folds, only_theirs)
        # 2. Unscale.
        claim(scaler, optimizers, self)
        unscale_(scaler, optimizers)
        # 3 to 7. The scalers of all ranks must know of a norm that is not finite, to lower the same scale.
        try:
            outcome = self.progress.advance(skips_on_device, self._fault() or fault, counted, signals)
        except NonFiniteError:
            join_found_inf(scaler, optimizers, True)
            raise
        norm = outcome.norm
        join_found_inf(scaler, optimizers, ~norm.isfinite() if isinstance(norm, Tensor) else not isfinite(norm))
        return outcome

    def _out_of_reach(self, folds: Folds, only_theirs: bool) -> LayoutError | None:
        """The error where a GradScaler cannot unscale a gradient: it knows what optimizers hold, in ``.grad``."""
        if not self.progress.storage.in_grad:
            raise refusals.scaler_with_gradients()
        for source, holder in enumerate(self.holders):
            if holder.grad is not None and id(holder) not in folds.parameters and not only_theirs:
                return refusals.not_unscaled(self.plan.label(self.plan.sources.index(source)))
        return None

    def _check(self, optimizers: Sequence[Optimizer], signals: Signals | None) -> None:
        """ValueError for what cannot be stepped; the other ranks, which make this call too, raise as well."""
        try:
            check_optimizers(optimizers)
        except ValueError as error:
            if self.plan.group.size > 1:
                with suppress(LayoutError):
                    said, of = LayoutError(str(error)), self._folding.of(())
                    self._advance((), of, None, only_theirs=False, skips_on_device=True, signals=signals, fault=said)
            raise

    def _not_folded(self, outcome: Outcome, folds: Folds) -> Sequence[Tensor]:
        """The gradients that no folding optimizer scales, including those that no optimizer holds."""
        if not folds.folded:
            return outcome.measured.runs
        if folds.folded >= self.owner.clipped:
            return ()
        pairs = zip(self.holders, outcome.measured.gradients, strict=True)
        return self.plan.look([None if id(holder) in folds.folded else g for holder, g in pairs]).parts()


def _enabled(scaler: GradScaler | None) -> GradScaler | None:
    return scaler if scaler is not None and scaler.is_enabled() else None
