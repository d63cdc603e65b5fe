"""From gradients to a decision: what one call of a Clipper measures, decides and commits."""

from collections import OrderedDict
from collections.abc import Callable, Set
from dataclasses import replace
from math import isfinite
from typing import Any, TypeAlias
from zlib import crc32

from torch import Tensor

from ..errors import FAILURES, LayoutError
from ..gradients.storage import Storage
from ..kernels.device import in_capture
from ..kernels.transfer import Transfer
from ..plan.build import Plan
from ..plan.contribution import Beside
from ..plan.copies import compare_copies
from ..plan.drift import judge
from ..plan.families import comparing
from ..plan.measure import fail_with_others, measure, norms_of
from ..plan.measured import Measured
from ..policies import Policy, State, Statistic
from ..policies.adopt import fitting, hash_of, made, with_keys
from ..policies.by_unit import in_order, labelled, orders_of
from ..policies.checks import count, finite
from ..policies.refusals import refusal_of
from ..policies.trust import is_trusted
from ..report import Fingerprint, Report
from ..shield import shielded
from . import refusals
from .by_unit import code_of, units_of
from .calls import Call, Calls
from .comparing import compared
from .decision import Outcome, decided_on_device, decided_on_host
from .fingerprints import Fingerprints
from .history import History, Recorder
from .nonfinite import Streak
from .proofs import Proofs
from .signals import Signals, given

ReportHook: TypeAlias = Callable[[Report, int], None]


class Progress:
    """Advances a policy over the steps of one plan.

    * ``holders``, ``storage``: the parameters of the plan, and where their gradients are.
    * ``on_device``: whether the decision stays where the norm is reduced, without a host sync.
    * ``units``: what the policy's statistics are of. ``watch``: what is reported beside them.
    * ``report``: of the latest step. ``recorder``: of all steps. ``hooks``: what is told of each step's report.
    * ``proofs``: of the layout.
    * ``signals`` of a call: numbers of the user, by name, that the policy asks for.
    * ``committed``: whether the ranks have decided in the call now being made, so that the other ranks will step.
    """

    def __init__(
        self,
        plan: Plan,
        holders: list[Tensor],
        storage: Storage,
        policy: Policy,
        streak: Streak,
        calls: Calls,
        compares_axes: bool,
        on_device: bool | None,
        watch: Statistic | None = None,
        fingerprint_every: int | None = None,
    ) -> None:
        self.plan, self.storage, self.policy, self.streak, self.calls = plan, storage, policy, streak, calls
        self.on_device = not plan.reads_are_free if on_device is None or plan.exact else on_device
        self.report: Report | None = None
        self.recorder = Recorder()
        self.hooks: OrderedDict[int, ReportHook] = OrderedDict()  # which a RemovableHandle can refer to
        self.committed = False
        self.units = units_of(plan)
        self.state = made(policy, self.units, plan.device)
        self.fingerprints = Fingerprints(fingerprint_every)
        self._watch = watch
        self._shows_values = plan.slots is not None and plan.slots.of_parameters  # to the policy, as norms
        self._trusted = is_trusted(policy)
        self._holders = holders
        self.proofs = Proofs(holders, storage, calls)
        self._compares_axes = compares_axes
        self._realigns = False  # becomes true, on all ranks, with the first gradient that has to be realigned
        self._captured = False  # whether a call was, so that a CUDA graph holds the state's memory
        self._unchecked: tuple[Transfer, Measured] | None = None  # the previous step, not read by the host yet

    def preview(
        self, fault: LayoutError | None, counted: Set[int] | None = None, signals: Signals | None = None
    ) -> Outcome:
        """Measure and decide without a step, as :meth:`.Clipper.measure` says: what is decided is not committed.

        ``fault``: what this rank knows to be wrong. It takes part in the all-reduce first, and then all ranks raise.
        ``counted``: ids of the parameters whose gradients are in the norm; None for all.
        """
        if self._unchecked is not None:
            self._check_previous()
        measured = self._measure(self.calls.measurement(), fault or self.plan.memory.late_error, counted, signals)
        outcome, _ = self._decide(measured)
        if outcome.disagree is True:
            raise refusals.ranks_disagree(measured.reduced.who)
        return outcome

    def fingerprint(self, fault: LayoutError | None, counted: Set[int] | None = None) -> Fingerprint:
        """See :meth:`.Clipper.fingerprint`. ``fault``, ``counted``: as in :meth:`preview`."""
        if self._unchecked is not None:
            self._check_previous()
        call, nothing = self.calls.fingerprinting(), dict.fromkeys(self.plan.signals, 0.0)
        measured = self._measure(call, fault or self.plan.memory.late_error, counted, nothing)
        return self.fingerprints.of(self.plan, measured, call)

    def advance(
        self,
        skips_on_device: bool,
        fault: LayoutError | None = None,
        counted: Set[int] | None = None,
        signals: Signals | None = None,
    ) -> Outcome:
        """Phases 3 to 7 of :meth:`Clipper.step`.

        ``skips_on_device``: whoever steps next takes the skip as a tensor, so that the host need not know it.
        """
        # 3. Check the previous step, if the host did not wait for it. All ranks do so in the same call, before they
        #    communicate: on a norm that is not finite they make three all-reduces here.
        if self._unchecked is not None:
            self._check_previous()
        capturing = self.on_device and in_capture(self.plan.device)
        if capturing and self.plan.reads_flags:
            raise refusals.read_in_capture()
        # 4. Measure: one all-reduce. This rank's own fault travels in it: raised earlier, it would hang the others.
        if fault is None and self.plan.memory.late_error is not None:
            fault = self.plan.memory.take_late_error()
        if not capturing:
            self.proofs.in_step(self.plan, fault, counted)
        call = self.calls.step(capturing)
        measured = self._measure(call, fault, counted, signals)
        fingerprint = None if capturing else self.fingerprints.in_step(self.plan, self.calls.steps + 1, measured, call)
        # 5. Decide, from reduced values only, so that all ranks decide alike.
        outcome, state = self._decide(measured)
        # 6. Check the decision where the host knows it or has to; otherwise in phase 3 of the next call.
        if self._must_check_now(outcome, skips_on_device):
            if capturing:
                raise refusals.read_in_capture()
            outcome = self._check(outcome)
        elif not capturing:
            self._check_later(outcome)
        if fingerprint is not None:
            outcome = replace(outcome, report=replace(outcome.report, fingerprint=fingerprint))
        # 7. Commit. From here on the other ranks step, whatever happens on this one.
        self._captured = self._captured or capturing
        self._commit(outcome, state)
        if not capturing:
            self._record(outcome)
        return outcome

    @shielded
    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Clipper.state_dict`."""
        policy = {name: value.detach().clone() for name, value in self.state.items()}
        counts = {"steps": self.calls.steps, "consecutive_skips": self.streak.skips}
        history = {"history": self.recorder.read().state_dict()}
        return {"policy": policy, **counts, **labelled(self.policy, self.units), **history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Clipper.load_state_dict`."""
        labels = labelled(self.policy, self.units)
        wanted = ("policy", "steps", "consecutive_skips", *labels, "history")
        if isinstance(state, dict) and set(wanted) - set(state) == {"history"}:  # of an older version, without one
            state = {"history": History().state_dict()} | state
        state = with_keys(state, wanted, "a Clipper's")
        steps, skips = (count(f"state {name}", state[name]) for name in ("steps", "consecutive_skips"))
        orders = orders_of(state["units"], labels["units"]) if labels else {}
        history = History.of_state(state["history"])
        fresh = made(self.policy, self.units, self.plan.device)
        held = hash_of(self.state, self.streak.skips) if self.calls.new else 0
        self.state = in_order(self.policy, self.units, fitting(state["policy"], fresh), orders)
        self.streak.skips = skips
        self.recorder.begin_anew(history)
        loaded = hash_of(self.state, skips)
        # A rank may load what all have anyway: before the first step torchft heals some ranks of a group alone.
        self.calls.begin_anew(steps, 0 if (steps, loaded) == (self.calls.steps, held) else loaded)
        self._unchecked = None
        self.plan.memory.take_late_error()

    def _measure(
        self, call: Call, fault: LayoutError | None, counted: Set[int] | None, signals: Signals | None
    ) -> Measured:
        plan, storage = self.plan, self.storage.among(self._holders, counted)
        try:
            gradients = storage.read()
            values = [each.values() for each in plan.held(self._holders)] if self._shows_values else ()
            beside = Beside(values, given(signals or {}, plan.signals) if signals or plan.signals else ())
        except FAILURES as failed:  # of a function of the user, for example
            fail_with_others(plan, failed, call.tag, call.name, self._realigns)
            raise
        measured = measure(
            *(plan, gradients, storage.store, call.tag),
            realign_first=self._realigns,
            error=fault,
            call=call.name,
            beside=beside,
            compares=comparing(plan.copies, call.steps, call.compares),
        )
        measured = compared(plan, measured, call, self.calls, self._holders if self._compares_axes else None)
        if measured.realigned and not self._realigns:
            # This changes the order of collectives in later calls. Where ranks disagree, some have raised before this
            # line, and the others must not change it by themselves.
            self._realigns = not measured.reduced.read()[1]
        if storage.scale is None:
            return measured
        scale = finite("Storage.scale()", storage.scale())
        return replace(measured, reduced=measured.reduced.unscaled(scale, plan.p), scale=scale)

    def _decide(self, measured: Measured) -> tuple[Outcome, State]:
        skips = self.streak.mode != "propagate"
        asked = measured, self.policy, self.state, skips, self.plan, self.units, self._watch
        if not self.on_device:
            return decided_on_host(*asked, self._trusted)
        last = None if self._captured else self.report  # a graph may own its memory, and write to it in a replay
        return decided_on_device(*asked, last)

    def _must_check_now(self, outcome: Outcome, skips_on_device: bool) -> bool:
        return (
            not self.on_device
            or self.streak.mode == "raise"
            or outcome.measured.can_overflow
            or (outcome.skip is not False and not skips_on_device)
        )

    def _check(self, outcome: Outcome) -> Outcome:
        """The outcome in numbers: at most one host sync. Errors are raised on all ranks alike."""
        outcome = outcome.read() if isinstance(outcome.norm, Tensor) else outcome
        if outcome.disagree:
            raise refusals.ranks_disagree(outcome.measured.reduced.who)
        if outcome.measured.reduced.drift:
            judge(self.plan, outcome.measured, float(outcome.norm), self.calls.name_of_step(committed=False))
        if outcome.fault:
            raise refusal_of(float(outcome.fault), self.policy, self.units)
        measured = outcome.measured
        if not isfinite(outcome.norm):
            return outcome.blamed_on(self.streak.record_nonfinite(self.plan, measured))
        norm = float(outcome.norm)
        if self.streak.culprit is not None or self.streak.skips or norm == 0:
            self.streak.record_finite(norm, any(gradient is not None for gradient in measured.gradients))
        compare_copies(self.plan, norm, measured.reduced.own, f"step {self.calls.steps}")
        return outcome

    def _check_later(self, outcome: Outcome) -> None:
        """Start copying to the host what the next call checks; keeps no gradient alive."""
        measured = outcome.measured
        kept = replace(measured, norms=norms_of(self.plan, measured)).without_gradients()
        faults = [outcome.fault] if isinstance(outcome.fault, Tensor) else []
        self._unchecked = Transfer.begin(measured.reduced.for_host(self.plan.device), *faults), kept

    def _check_previous(self) -> None:
        """Check the previous step, decided on an accelerator: its numbers have arrived by now, or are waited for.

        Never by polling, which ranks would answer differently, so that some would raise a call earlier than others.
        """
        if in_capture(self.plan.device):  # in which the host can read nothing: the first call after it checks
            return
        assert self._unchecked is not None
        (transfer, measured), self._unchecked = self._unchecked, None
        own, norm, disagree, drift, faults = measured.reduced.from_copy(transfer.read())
        if disagree:
            raise refusals.ranks_disagree()
        if drift:
            judge(self.plan, measured, norm, self.calls.name_of_step(committed=True))
        if not isfinite(norm):
            self.streak.record_nonfinite(self.plan, measured)
            return
        self.streak.record_finite(norm, measured.norms is not None and len(measured.norms.indices) > 0)
        compare_copies(self.plan, norm, own, f"step {self.calls.steps - 1}", warns=False)  # this call raises
        if any(faults):
            raise refusal_of(faults[0], self.policy, self.units)

    def _commit(self, outcome: Outcome, state: State) -> None:
        if not self.on_device:  # which follows from where numbers are reduced, so on all ranks or on none
            by_unit = code_of(outcome.by_slot) if outcome.by_slot else ""
            self.calls.decided = crc32(f"{outcome.coef:.6g} {outcome.skip} {outcome.clamp} {by_unit}".encode())
        if self._trusted and not self._captured:
            self.state = state
        else:  # in place: a captured graph reads the state where it wrote it; and a policy may return what it keeps
            for name, value in state.items():
                self.state[name].copy_(value)
        self.calls.steps += 1
        self.calls.loaded = 0
        self.report = outcome.report
        self.committed = True

    def _record(self, outcome: Outcome) -> None:
        """Count the step, and tell who listens."""
        if self.on_device:  # also where the host knows this step: those before it may not have arrived
            self.recorder.keep(outcome.report)
        else:
            self.recorder.add(float(outcome.norm), float(outcome.coef), bool(outcome.skip))
        for hook in tuple(self.hooks.values()):
            hook(outcome.report, self.calls.steps)
