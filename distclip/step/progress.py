"""What one call of a Clipper reads and commits: from gradients to a decision, the policy's state and the counters."""

from collections.abc import Set
from dataclasses import replace
from math import isfinite
from typing import Any
from zlib import crc32

from torch import Tensor

from ..errors import FAILURES, LayoutError
from ..gradients.storage import Storage
from ..kernels.device import in_capture, reads_are_free
from ..kernels.transfer import Transfer
from ..plan.build import Plan
from ..plan.copies import compare_copies, compare_gradients
from ..plan.measure import fail_with_others, measure, norms_of
from ..plan.measured import Measured
from ..plan.split import compare_axes
from ..policies import Policy, State
from ..policies.adopt import fitting, hash_of, made, with_keys
from ..policies.answer import is_trusted, refusal_of
from ..policies.checks import count
from ..report import Report
from ..shield import shielded
from . import refusals
from .calls import Call, Calls
from .decision import Outcome, decided_on_device, decided_on_host
from .nonfinite import Streak


class Progress:
    """Advances a policy over the steps of one plan.

    ``holders``, ``storage``: the parameters of the plan, and where their gradients are. ``on_device``: whether the
    decision stays on the device where the norm is reduced, which nothing then waits for. ``report``: of the latest
    step. ``committed``: whether the ranks have decided in the call that is being made, so that the others will step.
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
    ) -> None:
        self.plan, self.storage, self.policy, self.streak, self.calls = plan, storage, policy, streak, calls
        self.on_device = not reads_are_free(plan.device) if on_device is None else on_device
        self.report: Report | None = None
        self.committed = False
        self.state = made(policy, plan.device)
        self._trusted = is_trusted(policy)
        self._holders = holders
        self._compares_axes = compares_axes
        self._realigns = False  # becomes true, on all ranks, with the first gradient that has to be realigned
        self._captured = False  # whether a call was, so that a CUDA graph holds the state's memory
        self._unread: tuple[Transfer, Measured] | None = None

    def measure(self, fault: LayoutError | None, among: Set[int] | None = None) -> Outcome:
        """Measure and decide; nothing changes.

        ``fault``: what this rank knows to be wrong, raised by all ranks once they have met. ``among``: the ids of the
        parameters whose gradients count; None for all.
        """
        if self._unread is not None:
            self._look_back()
        measured = self._measure(self.calls.measurement(), fault or self.plan.memory.late_error, among)
        outcome, _ = self._decide(measured)
        if outcome.disagree is True:
            raise refusals.ranks_disagree(measured.reduced.who)
        return outcome

    def advance(
        self, skips_on_device: bool, fault: LayoutError | None = None, among: Set[int] | None = None
    ) -> Outcome:
        """Measure, decide, look at the decision or leave that for the next call, and commit the policy's state.

        ``skips_on_device``: whoever steps next is told to skip by a tensor, so that the host need not know.
        """
        # 1. What the step before left on the device is looked at now, by all ranks in the same call.
        if self._unread is not None:
            self._look_back()
        capturing = self.on_device and in_capture(self.plan.device)
        if capturing and self.plan.reads_flags:
            raise refusals.read_in_capture()
        # 2. Measure: one all-reduce. Whatever is wrong on this rank travels in it, so that no other waits for us.
        call = self.calls.step(capturing)
        if fault is None and self.plan.memory.late_error is not None:
            fault = self.plan.memory.take_late_error()
        measured = self._measure(call, fault, among)
        # 3. Decide, from reduced values alone.
        outcome, state = self._decide(measured)
        # 4. Look at the decision where that is free or somebody must know; else leave it for the next call.
        if self._must_look(outcome, skips_on_device):
            if capturing:
                raise refusals.read_in_capture()
            outcome = self._look(outcome)
        elif not capturing:
            self._leave(outcome)
        # 5. Commit: from here on the other ranks step, whatever happens on this one.
        self._captured = self._captured or capturing
        self._commit(outcome, state)
        return outcome

    @shielded
    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Clipper.state_dict`."""
        policy = {name: value.detach().clone() for name, value in self.state.items()}
        return {"policy": policy, "steps": self.calls.steps, "consecutive_skips": self.streak.skips}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Clipper.load_state_dict`."""
        state = with_keys(state, ("policy", "steps", "consecutive_skips"), "a Clipper's")
        steps, skips = (count(f"state {name}", state[name]) for name in ("steps", "consecutive_skips"))
        self.state = fitting(state["policy"], made(self.policy, self.plan.device))
        self.streak.skips = skips
        self.calls.begin_anew(steps, hash_of(self.state, skips))
        self._unread = None
        self.plan.memory.take_late_error()

    def _measure(self, call: Call, fault: LayoutError | None, among: Set[int] | None) -> Measured:
        plan, storage = self.plan, self.storage
        try:
            gradients = storage.read()
        except FAILURES as failed:  # of a function of the user, for example
            fail_with_others(plan, failed, call.tag, call.name, self._realigns)
            raise
        if among is not None:
            pairs = zip(self._holders, gradients, strict=True)
            gradients = [gradient if id(holder) in among else None for holder, gradient in pairs]
        measured = measure(
            plan, gradients, storage.store, call.tag, realign_first=self._realigns, error=fault, call=call.name
        )
        if call.compares and compare_gradients(plan, measured):
            if self._compares_axes:
                compare_axes(plan, self._holders, measured)
            self.calls.compared()
        if measured.realigned and not self._realigns:  # where ranks disagree, some of them have raised before this line
            self._realigns = not measured.reduced.read()[1]
        if storage.scale is None:
            return measured
        return replace(measured, reduced=measured.reduced.unscaled(storage.scale(), plan.p))

    def _decide(self, measured: Measured) -> tuple[Outcome, State]:
        skips = self.streak.mode != "propagate"
        last = None if self._captured else self.report  # whose memory may be that of a graph
        if self.on_device:
            return decided_on_device(measured, self.policy, self.state, skips, self.plan.device, last)
        return decided_on_host(measured, self.policy, self.state, skips, self.plan.device, self._trusted)

    def _must_look(self, outcome: Outcome, skips_on_device: bool) -> bool:
        return (
            not self.on_device
            or self.streak.mode == "raise"
            or outcome.measured.can_overflow
            or (outcome.skip is not False and not skips_on_device)
        )

    def _look(self, outcome: Outcome) -> Outcome:
        """The outcome in numbers; raise, on all ranks alike, what must be raised."""
        if isinstance(outcome.norm, Tensor):
            outcome = outcome.read()
        if outcome.disagree:
            raise refusals.ranks_disagree(outcome.measured.reduced.who)
        if outcome.fault:
            raise refusal_of(float(outcome.fault), self.policy)
        measured = outcome.measured
        if not isfinite(outcome.norm):
            return outcome.blamed_on(self.streak.add(self.plan, measured))
        norm = float(outcome.norm)
        if self.streak.culprit is not None or self.streak.skips or norm == 0:
            self.streak.end(norm, any(gradient is not None for gradient in measured.gradients))
        if self.plan.fully_replicated:
            compare_copies(self.plan, norm, measured.reduced.own, f"step {self.calls.steps}")
        return outcome

    def _leave(self, outcome: Outcome) -> None:
        """Start copying to the host what the next call looks at, and keep no gradient for that."""
        measured = outcome.measured
        kept = replace(measured, norms=norms_of(self.plan, measured)).without_gradients()
        faults = [outcome.fault] if isinstance(outcome.fault, Tensor) else []
        self._unread = Transfer.begin(measured.reduced.to_send(self.plan.device), *faults), kept

    def _look_back(self) -> None:
        """The one fixed place where a step decided on an accelerator is looked at, by waiting and never by a query."""
        if in_capture(self.plan.device):
            return
        assert self._unread is not None
        (transfer, measured), self._unread = self._unread, None
        own, norm, disagree, faults = measured.reduced.sent(transfer.read())
        if disagree:
            raise refusals.ranks_disagree()
        if not isfinite(norm):
            self.streak.add(self.plan, measured)
            return
        self.streak.end(norm, measured.norms is not None and len(measured.norms.indices) > 0)
        compare_copies(self.plan, norm, own, f"step {self.calls.steps - 1}", warns=False)  # this call raises
        if any(faults):
            raise refusal_of(faults[0], self.policy)

    def _commit(self, outcome: Outcome, state: State) -> None:
        if not self.on_device:  # where the numbers are reduced, so on all ranks or on none
            self.calls.decided = crc32(f"{outcome.coef:.6g} {outcome.skip} {outcome.bounds}".encode())
        if self._trusted and not self._captured:
            self.state = state
        else:  # in place: a captured graph reads the next state where it wrote the last one
            for name, value in state.items():
                self.state[name].copy_(value)
        self.calls.steps += 1
        self.calls.loaded = 0
        self.report = outcome.report
        self.committed = True
