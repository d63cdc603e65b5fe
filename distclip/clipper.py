"""Clipper: a plan and a policy, the object that a training loop holds."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from math import inf, isfinite
from typing import Any, Literal, SupportsIndex, TypedDict
from warnings import warn
from weakref import WeakSet, WeakValueDictionary
from zlib import crc32

import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from .errors import FAILURES, LayoutError, NonFiniteError
from .gradients.look import look
from .gradients.storage import in_grad
from .kernels import clamp_, scale_
from .kernels.device import in_capture, reads_are_free
from .kernels.transfer import Flags
from .layouts.layout import LayoutFn
from .layouts.model import ParameterFilter, Reading, chosen, held_in, parts_of
from .layouts.piece import holders_of, once
from .optimizers.fused import Folding, Folds, may_skip_on_device
from .optimizers.hooks import check_optimizers, held_by, skip_next_step
from .optimizers.scaler import claim, join_found_inf, skipping, unscale_
from .optimizers.wrapped import around
from .plan.build import Plan
from .plan.construction import compare_ranks, tell_ranks
from .plan.copies import compare_copies, compare_gradients, has_copies
from .plan.culprit import find_culprit, nonfinite
from .plan.measure import measure, norms_of
from .plan.measured import Measured
from .plan.split import compare_axes
from .plan.verify import ABSENT, verify
from .policies import Policy, State
from .policies.adopt import as_policy, bound_by_place, fitting, hash_of, made, spelled, with_keys
from .policies.answer import is_trusted, refusal_of
from .policies.checks import count, positive
from .ranks.group import Axis, ClippingGroup
from .report import Culprit, Report
from .shield import shielded, untraced
from .step.broken_off import BrokenOff
from .step.decision import Outcome, Stepping, decided
from .step.joining import joinable_in, refuse_join

NONFINITE = ("skip", "raise", "propagate")
SETTINGS = ("norm_type", "policy", "nonfinite", "max_consecutive_skips", "split_over", "layout", "only")
COMPARING = 1 << 12  # tag of a call in which copies of gradients are compared
TURN = 45499  # odd, and its multiples lie far apart: no Clipper meets another one of its group, whatever their steps
MEASURING = 1 << 15  # tag of a measurement, so that measure() on one rank never pairs with a step on another
DISAGREE = (
    "the ranks of the clipping group do not agree: one of them stopped with an error of its own (see its message), "
    "holds other parameters, lacks a gradient that others have, made one call of Clipper more or less, called another "
    "Clipper, or has a policy that decided otherwise in the step before; let every rank make the same calls in order"
)
CAPTURED = (
    "no norm can be read inside the capture of a CUDA graph: leave out nonfinite='raise', p > 7, float64 gradients, "
    "layout=, split_over= and DTensors that FSDP2 does not manage, and give step() fused optimizers"
)

FIXED = (
    "a Clipper keeps the policy that its ranks have agreed on: build another for another bound, Clipper(model, 0.5), "
    "or give it a policy whose bound changes with its own state"
)

_alive: WeakValueDictionary[int, "Clipper"] = WeakValueDictionary()


def alive() -> list["Clipper"]:
    """All Clippers of this process. Others may be made meanwhile, by another thread."""
    return [clipper for each in _alive.valuerefs() if (clipper := each()) is not None]


class Options(TypedDict, total=False):
    """The keywords of :class:`Clipper`, for those who make one on behalf of a user."""

    group: dist.ProcessGroup | None
    split_over: Sequence[Axis]
    layout: LayoutFn | None
    only: ParameterFilter | None
    norm_type: float
    nonfinite: Literal["skip", "raise", "propagate"]
    max_consecutive_skips: int | None


class Clipper:
    """Clips by the true global norm, skips alike on all ranks, and keeps the policy's state.

    * ``model``: one module, or the parts this rank holds (pipeline stages). Parameters are read once, here.
    * ``policy``: a :class:`Policy`, or a number, which means :class:`MaxNorm`.
    * ``group``: the ranks that take part; None is the default group, and every one of its ranks must make every call.
    * ``split_over``: 1-D mesh slices or process groups whose ranks hold *different* parameters (``mesh["pp"]``).
    * ``layout``: ``(name, parameter) -> Layout | None``, for parameters that metadata does not describe.
    * ``only``: ``(name, parameter) -> bool``, which parameters are in the norm and are scaled; None means all. The
      others are left alone: no optimizer scales them, but a step that is skipped skips them too.
    * ``norm_type``: p > 0, or inf. 1, 2, 3 and inf are right from 1e-30 to 1e30; at p = 100 a norm below 8e-4 is lost.
    * ``nonfinite``: what a norm that is not finite does. ``"skip"``: no rank steps and gradients stay as they are.
      ``"raise"``: NonFiniteError on every rank, gradients untouched. ``"propagate"``: scale and step, as torch does.
    * ``max_consecutive_skips``: so many non-finite steps in a row are skipped; the next raises NonFiniteError.

    The parameters of all ranks, ``norm_type`` and the policy are compared once, here, by two all-reduces of a word or
    two a parameter, and ranks that should hold copies must hold the same values: LayoutError or ValueError on all ranks
    where not. Every ``measure``, ``clip_`` and ``step`` makes one all-reduce of two float64 words (four for inf), DDP
    included, so that ranks decide alike even when one replica is corrupt. In calls 1, 2, 4, 8, ... of ``clip_`` and
    ``step``, counted from when it was built or a state was loaded, gradients of which ranks should hold copies are
    compared before anything is scaled: one all-reduce more, of five words for each such parameter, and a LayoutError on
    all ranks where they differ (a reduction that was left out, experts taken for copies), or where ranks along
    ``split_over`` hold the same values and gradients of a parameter (three all-reduces more); after a norm that is not
    finite in the next call. In other calls, where every rank holds all gradients and those of one have a norm that is
    1e-6 off, that one warns and the next call raises on all. Two words more travel with DTensors that FSDP2 does not
    manage, ``split_over`` or ``layout``: they say whether some rank holds float64, and whether gradients lie otherwise
    than their parameters (sequence-parallel norms leave pending sums), which are then redistributed into ``.grad``,
    from then on before the all-reduce. A call that raises leaves gradients and policy state as they were, but for
    pending sums that were made by then. A policy's answer that no step can use is a ValueError (see :class:`Decision`).

    Nothing here waits for an accelerator but ``nonfinite="raise"``, ``step`` with an optimizer that cannot fold,
    float64 gradients, p > 7, the extra words, and words that travel on the host (Gloo, and devices without float64);
    together they cost one wait a step, with the extra words two. So does comparing copies, in those few calls, two.
    Gradients on the host beside those on an accelerator wait for their factor. Without a wait, non-finite norms,
    disagreement and bad answers of a policy are looked at when the next call starts, so an error and :attr:`culprit`
    come one call late. A bad answer skips its step, for which a policy of your own waits under ``"propagate"`` too
    where an optimizer cannot fold. A coefficient below float32's normal numbers, exact elsewhere, is the least of them
    where nobody waits for it. Inside the capture of a CUDA graph nothing is looked at (RuntimeError where it must be),
    and a replay is no call: it advances the policy, but counts no step.

    >>> import torch
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> clipper = Clipper(model, 1.0)
    >>> (model.weight * 4 - model.bias * 3).sum().backward()
    >>> report = clipper.step(optimizer)
    >>> round(report.norm.item(), 4), round(report.coef.item(), 4)
    (11.3578, 0.088)
    """

    @bound_by_place("Clipper(model, {})")
    @shielded
    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        policy: Policy | float,
        *,
        group: dist.ProcessGroup | None = None,
        split_over: Sequence[Axis] = (),
        layout: LayoutFn | None = None,
        only: ParameterFilter | None = None,
        norm_type: float = 2.0,
        nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        max_consecutive_skips: int | None = None,
    ) -> None:
        where = ClippingGroup.of(group)
        parts: list[nn.Module] = []
        try:
            parts = parts_of(model)
            if nonfinite not in NONFINITE:
                raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
            if max_consecutive_skips is not None and max_consecutive_skips < 1:
                raise ValueError(f"max_consecutive_skips must be at least 1 or None, got {max_consecutive_skips!r}")
            self._policy = as_policy(policy)
            self._nonfinite = nonfinite
            self._max_consecutive_skips = max_consecutive_skips
            p = positive("norm_type", norm_type)
            given = ("given" if each else "not given" for each in (split_over, layout, only))
            said = (str(p), spelled(self._policy), nonfinite, str(max_consecutive_skips), *given)
            settings = dict(zip(SETTINGS, said, strict=True))
            everything = once(held_in(parts))
            listed = chosen(everything, only)
            self._plan = Plan.of(listed, p, where, split_over, layout)
            self._state = made(self._policy, self._plan.device)
        except FAILURES as error:
            device = where.device_for(parameter for part in parts for parameter in part.parameters())
            tell_ranks(where, device, dict.fromkeys(SETTINGS, ""), error)
            raise
        self._holders = holders_of(listed)
        self._storage = in_grad(self._holders)
        self._ids = frozenset(map(id, self._holders))
        self._left_out = frozenset(id(item.holder) for item in everything) - self._ids
        self._folding = Folding(self._ids)
        self._steps = 0
        self._loaded = 0  # hash of a state that no step was made with yet
        self._decided = 0  # hash of the latest decision, where the host knows it
        self._realigns = False  # becomes true, on all ranks, with the first gradient that has to be realigned
        self._skips = 0
        self._captured = False  # whether a call was, so that a CUDA graph holds the state's memory
        self._unread: tuple[Flags, Measured] | None = None
        self._culprit: Culprit | None = None
        self._report: Report | None = None
        self._clips_for: WeakSet[Optimizer] = WeakSet()  # as far as known
        self._driver: str | None = None  # who calls, where it is not the user
        self._empty = False  # whether a step without any gradient was told of
        compare_ranks(self._plan, listed, settings)
        self._number = self._plan.group.add_clipper()
        self._calls = 0
        self._compares_axes = bool(split_over) and where.size > 1
        self._compare_in = 1.0 if self._compares_axes or has_copies(self._plan) else inf  # the next call that compares
        self._reading = Reading(parts, holders_of(everything))
        self._joinable = joinable_in(parts)
        self._broken_off = BrokenOff(where.size > 1)
        _alive[id(self)] = self

    def __repr__(self) -> str:
        """Policy, parameters, ranks and steps; nothing is waited for."""
        plan = self._plan
        return (
            f"{type(self).__name__}({self._policy!r}, norm_type={plan.p:g}, {len(plan.pieces)} parameters, "
            f"{plan.group.size} rank{'s' if plan.group.size > 1 else ''}, {self._steps} steps)"
        )

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """A Clipper is neither copied nor pickled: it would hold a model that the loop does not train."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled, since it clips the parameters of one model: save "
            "state_dict(), or build one for the copied model and load_state_dict() that"
        )

    @property
    def policy(self) -> Policy:
        """The policy that it was built with: no other takes its place, since all ranks have agreed on this one."""
        return self._policy

    @policy.setter
    def policy(self, value: object) -> None:
        raise AttributeError(FIXED)

    @property
    def max_norm(self) -> float:
        """The bound of a Clipper that was built with a number; AttributeError with another policy."""
        bound: float = getattr(self._policy, "max_norm")  # noqa: B009
        return bound

    @max_norm.setter
    def max_norm(self, value: object) -> None:
        raise AttributeError(FIXED)

    @property
    def culprit(self) -> Culprit | None:
        """Where the norm of the latest ``clip_`` or ``step`` came from if it was not finite; None if it was."""
        return self._culprit

    @property
    def report(self) -> Report | None:
        """What the latest ``clip_`` or ``step`` did, also where a hook made the call; None before the first.

        A GradScaler that skips an attached optimizer by itself makes no call, and this stays what it was: see
        :attr:`steps`.
        """
        return self._report

    @property
    def steps(self) -> int:
        """How many times ``clip_`` or ``step`` were called: where it has not grown, ``report`` is of an older step."""
        return self._steps

    @shielded
    def measure(self) -> Report:
        """Return norm and decision for the gradients as they are: nothing changes, neither policy state nor counters.

        One all-reduce, waits as the class says. Ranks that disagree get a LayoutError at once where reading is free, a
        norm of NaN on accelerators.
        """
        refuse_join(self._joinable)
        self._read_late_flags()
        fault = self._broken_off.fault() or self._reading.lost() or self._plan.memory.late_error
        measured = self._measure(tag=self._steps + MEASURING, fault=fault)
        outcome, _ = self._decide(measured)
        if outcome.disagree is True:
            raise LayoutError(f"{DISAGREE}{measured.reduced.who}")
        return outcome.report

    @untraced
    def clip_(self) -> Report:
        """Scale (or clamp) the gradients in place as the policy decides, and advance the policy once.

        Call after the last backward of a step, after unscaling, before ``optimizer.step()``. Gradients keep their
        bits where the coefficient is 1 and where ``report.skip`` is true: then the caller must not step. One
        all-reduce (on a non-finite norm three more); waits as the class says.
        """
        self._refuse_a_second_owner()
        return self._clip()

    @untraced
    def step(self, *optimizers: Optimizer, scaler: GradScaler | None = None) -> Report:
        """Clip and step every optimizer, or skip on all ranks alike; advance the policy once.

        A fused Adam, AdamW, SGD or Adagrad applies the coefficient itself, without a pass over the gradients; for the
        others the gradients are scaled first. Afterwards the content of ``.grad`` is unspecified. Gradients that none
        of them holds are in the norm and scaled too: a discriminator's, in a step of the generator, unless they were
        set to None or it has a Clipper of its own (``attach`` leaves them out). One all-reduce (on
        a non-finite norm three more). Waits once a step on an accelerator if any optimizer cannot fold.

        ``scaler``: unscales every optimizer for which you did not, and steps it. A norm that is not finite on any rank
        lowers the scale of all ranks at your ``scaler.update()``; a skip for the policy's own reason does not.
        """
        self._refuse_a_second_owner()
        try:
            check_optimizers(optimizers)
        except ValueError as error:
            self._tell(error)
            raise
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        with self._broken_off:
            stepping = self._begin(optimizers, scaler)
            if stepping.outcome.skip is True:
                return stepping.outcome.report
            unless_scaled = stepping if scaler is None else replace(stepping, skip=None)
            for index, optimizer in enumerate(optimizers):
                with unless_scaled.around(index, optimizer):
                    if scaler is None:
                        optimizer.step()
                    else:
                        with skipping(optimizer, stepping.skip):
                            scaler.step(optimizer)
        return stepping.outcome.report

    @shielded
    def verify(self) -> None:
        """Prove the layout on the gradients of a backward, before the step; LayoutError on all ranks if it is wrong.

        The norm's own sum, with 1 in place of |g|**p, must count every parameter's elements once. Copies of a parameter
        must hold the same bits, and copies of a gradient must be equal (inside ``no_sync`` they are not). Where
        ``split_over`` or ``layout`` say that ranks hold different parameters, gradients of the same shape and bits must
        add up to one (a tied weight on two stages does not). No other Clipper may hold the same parameters, unless both
        are known to step other optimizers (DiLoCo's inner and outer): attached, or given them in a step before. Five
        all-reduces of a few words a parameter, and a wait; gradients are never gathered.
        """
        refuse_join(self._joinable)
        rivals = sum(1 for other in alive() if other is not self and self._may_clip_again(other))
        fault = self._reading.lost()
        if rivals:
            fault = LayoutError(
                f"{rivals} other Clipper(s) hold parameters of this one and would clip them again: keep one Clipper "
                "for each parameter; where optimizers share parameters on purpose (DiLoCo), attach() one to each, or "
                "call verify() after each has made a step()"
            )
        verify(self._plan, self._holders, self._storage, fault, TURN * self._number, self._named("verify()"))

    def _may_clip_again(self, other: "Clipper") -> bool:
        """Whether ``other`` holds parameters of this one, and is not known to clip for other optimizers."""
        apart = self._clips_for and other._clips_for and not set(self._clips_for) & set(other._clips_for)
        return not apart and not self._ids.isdisjoint(other._ids)

    def _note(self, optimizers: Iterable[Optimizer]) -> None:
        """Know from now on that this Clipper clips for ``optimizers``, and for what is inside of them."""
        for optimizer in optimizers:
            if optimizer not in self._clips_for:
                self._clips_for.update(around(optimizer))

    @shielded
    def state_dict(self) -> dict[str, Any]:
        """The policy's state and the counters: the same on every rank, for any number of ranks, copied."""
        policy = {name: value.detach().clone() for name, value in self._state.items()}
        return {"policy": policy, "steps": self._steps, "consecutive_skips": self._skips}

    @shielded
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned, here or on another number of ranks; ValueError if it is not.

        Every rank must load the same: the next call is a LayoutError on all of them where one did not.
        """
        state = with_keys(state, ("policy", "steps", "consecutive_skips"), "a Clipper's")
        steps, skips = (count(f"state {name}", state[name]) for name in ("steps", "consecutive_skips"))
        self._state = fitting(state["policy"], made(self._policy, self._plan.device))
        self._steps, self._skips = steps, skips
        self._loaded, self._decided = hash_of(self._state, skips), 0
        self._unread = None
        self._plan.memory.take_late_error()
        self._calls, self._compare_in = 0, inf if self._compare_in == inf else 1.0
        self._broken_off.forget()

    def _tell(self, error: ValueError) -> None:
        """Take part in the call of the others, who raise as well, where this rank is about to raise ``error``."""
        if self._plan.group.size > 1:
            with suppress(LayoutError):
                self._clip(LayoutError(str(error)))

    @shielded
    def _clip(self, fault: LayoutError | None = None) -> Report:
        """Advance, and scale the gradients in place."""
        with self._broken_off:
            outcome = self._advance(True, fault)
            self._apply(outcome, outcome.measured.runs)
        return outcome.report

    @shielded
    def _clip_before(self, optimizers: Sequence[Optimizer], scaler: GradScaler | None = None) -> Report:
        """Unscale, advance and scale in place, so that the steps a framework makes next change nothing if skipped.

        A scaler skips non-finite steps by itself, and must hear of the policy's own before it: that is waited for.
        """
        folds = self._folding.of(optimizers)
        if scaler is None or not scaler.is_enabled():
            report = self._clip(self._foreign_to(folds, optimizers))
            skip_next_step(optimizers, report.skip)
            return report
        with self._broken_off:
            outcome = self._advance_unscaled(scaler, optimizers, folds, skips_on_device=False)
            self._apply(outcome, outcome.measured.runs)
        skip_next_step(optimizers, (outcome.report.skip & outcome.report.norm.isfinite()).cpu())
        return outcome.report

    @shielded
    def _begin(self, optimizers: Sequence[Optimizer], scaler: GradScaler | None = None) -> Stepping:
        """Advance, and scale the gradients that ``optimizers`` will not scale themselves."""
        with self._broken_off:
            return self._begun(optimizers, scaler)

    def _begun(self, optimizers: Sequence[Optimizer], scaler: GradScaler | None) -> Stepping:
        self._note(optimizers)
        folds = self._folding.of(optimizers)
        on_device = not reads_are_free(self._plan.device) and all(folds.by_optimizer)
        on_device = on_device and all(map(may_skip_on_device, optimizers))
        if scaler is None:
            outcome = self._advance(on_device, self._foreign_to(folds, optimizers))
        else:
            outcome = self._advance_unscaled(scaler, optimizers, folds, on_device)
        gradients, coef = outcome.measured.runs, None
        if outcome.can_fold and outcome.skip is not True:
            gradients, coef = self._not_folded(outcome.measured, folds), outcome.report.coef
        self._apply(outcome, gradients)
        return Stepping(outcome, folds, coef, outcome.skip if isinstance(outcome.skip, Tensor) else None)

    def _foreign_to(self, folds: Folds, optimizers: Sequence[Optimizer]) -> LayoutError | None:
        """What is wrong where an optimizer holds parameters that nobody clips, and would step them as they are.

        Those that ``only`` leaves out are left alone on purpose. Another Clipper may clip some, but not all that an
        optimizer holds: then the optimizers of two Clippers were mixed up.
        """
        if folds.foreign <= self._left_out:
            return None
        known = self._ids | self._left_out
        elsewhere = frozenset[int]().union(*(other._ids for other in alive()))
        for optimizer in optimizers:
            held = {id(parameter): parameter for parameter in held_by(optimizer)}
            foreign = [p for i, p in held.items() if i not in known and p.requires_grad]  # frozen ones are not stepped
            if len(foreign) < len(held):
                foreign = [p for p in foreign if id(p) not in elsewhere]
            if foreign:
                return LayoutError(
                    f"{type(optimizer).__name__} holds {len(foreign)} of {len(held)} parameters, first one of shape "
                    f"{tuple(foreign[0].shape)}, that this Clipper does not: build it anew, after the model has got "
                    "them, from all modules whose parameters are stepped (only=... leaves some of them unclipped)"
                )
        return None

    def _refuse_a_second_owner(self) -> None:
        if self._driver is not None:
            raise RuntimeError(
                f"{self._driver} clips with this Clipper already: do not call clip_() or step() yourself (measure() "
                "looks without changing anything, and report says what the latest step did)"
            )

    def _advance(self, skips_on_device: bool, fault: LayoutError | None = None) -> Outcome:
        """Measure, decide, look at the flags or leave them for the next call, and commit the policy's state."""
        refuse_join(self._joinable)
        self._read_late_flags()
        capturing = in_capture(self._plan.device)
        if capturing and self._plan.reads_flags:
            raise RuntimeError(CAPTURED)
        fault = self._broken_off.fault() or self._reading.lost() or fault or self._plan.memory.take_late_error()
        self._calls += not capturing
        measured = self._measure(tag=self._steps, fault=fault)
        outcome, state = self._decide(measured)
        if (
            reads_are_free(self._plan.device)
            or self._nonfinite == "raise"
            or measured.can_overflow
            or (outcome.skip is not False and not skips_on_device)
        ):
            if capturing:
                raise RuntimeError(CAPTURED)
            outcome = self._looked_at(outcome)
        elif not capturing:
            kept = replace(measured, norms=norms_of(self._plan, measured)).without_gradients()
            faults = [outcome.fault] if isinstance(outcome.fault, Tensor) else []
            self._unread = Flags.send(measured.reduced.to_send(self._plan.device), *faults), kept
        if reads_are_free(self._plan.device):  # where the words are reduced, so on all ranks or on none
            self._decided = crc32(f"{outcome.coef:.6g} {outcome.skip} {outcome.bounds}".encode())
        self._captured = self._captured or capturing
        self._remember(state)
        self._steps += 1
        self._broken_off.decided()
        self._loaded = 0
        self._report = outcome.report
        return outcome

    def _remember(self, state: State) -> None:
        """Commit the policy's state: in place where a captured graph reads the next one where it wrote the last."""
        if is_trusted(self._policy) and not self._captured:
            self._state = state
            return
        for name, value in state.items():
            self._state[name].copy_(value)

    def _advance_unscaled(
        self, scaler: GradScaler, optimizers: Sequence[Optimizer], folds: Folds, skips_on_device: bool
    ) -> Outcome:
        """The same after unscaling, with what it found not finite made known to the scalers of all ranks."""
        fault = self._foreign_to(folds, optimizers)
        for source, holder in enumerate(self._holders):
            if holder.grad is not None and id(holder) not in folds.held:
                label = self._plan.label(self._plan.sources.index(source))
                fault = fault or LayoutError(
                    f"{label} has a gradient and is in none of the optimizers, so that the scaler cannot unscale it: "
                    "pass every optimizer to one step()"
                )
        claim(scaler, optimizers, self)
        unscale_(scaler, optimizers)
        try:
            outcome = self._advance(skips_on_device, fault)
        except NonFiniteError:
            join_found_inf(scaler, optimizers, True)
            raise
        nonfinite = ~outcome.norm.isfinite() if isinstance(outcome.norm, Tensor) else not isfinite(outcome.norm)
        join_found_inf(scaler, optimizers, nonfinite)
        return outcome

    def _measure(self, tag: int, fault: LayoutError | None = None) -> Measured:
        """Measure; raise ``fault`` where it is given, once all ranks have met."""
        gradients = self._storage.read()
        steps = tag == self._steps
        call = self._named(f"step {self._steps}" if steps else f"measure() in step {self._steps}")
        if self._loaded:
            tag, call = tag + self._loaded, f"{call} after loading a state (hash {self._loaded:x})"
        compares = steps and self._calls >= self._compare_in and not in_capture(self._plan.device)
        tag += TURN * self._number + COMPARING * compares + self._decided
        measured = measure(
            self._plan, gradients, self._storage.store, tag, realign_first=self._realigns, error=fault, call=call
        )
        if compares and compare_gradients(self._plan, measured):
            if self._compares_axes:
                compare_axes(self._plan, self._holders, measured)
            self._compare_in = 2 * self._calls
        if measured.realigned and not self._realigns:  # where ranks disagree, some of them have raised before this line
            self._realigns = not measured.reduced.read()[1]
        return measured

    def _named(self, call: str) -> str:
        """What ``call`` is named where ranks do not agree: also by whom, where the group has built several Clippers."""
        return f"{call} of Clipper {self._number + 1}" if self._plan.group.clippers > 1 else call

    def _decide(self, measured: Measured) -> tuple[Outcome, State]:
        device, skips_nonfinite = self._plan.device, self._nonfinite != "propagate"
        last = None if self._captured else self._report  # whose memory may be that of a graph
        return decided(measured, self._policy, self._state, skips_nonfinite, device, reads_are_free(device), last)

    def _looked_at(self, outcome: Outcome) -> Outcome:
        """The outcome in numbers; raise, on all ranks alike, what must be raised."""
        outcome = outcome.read()
        if outcome.disagree:
            raise LayoutError(f"{DISAGREE}{outcome.measured.reduced.who}")
        if outcome.fault:
            raise refusal_of(float(outcome.fault), self._policy)
        if isfinite(outcome.norm):
            self._note_finite(float(outcome.norm), any(g is not None for g in outcome.measured.gradients))
            compare_copies(self._plan, float(outcome.norm), outcome.measured.reduced.own, f"step {self._steps}")
            return outcome
        return outcome.blamed_on(self._blame(outcome.measured))

    def _note_finite(self, norm: float, has_gradients: bool) -> None:
        """A step whose norm was finite; warn, once, of one that had no gradient at all."""
        self._skips, self._culprit = 0, None
        if norm == 0 and not has_gradients and not self._empty:
            self._empty = True
            warn(f"no gradient on this rank, and a norm of 0 over all: {ABSENT}", RuntimeWarning, stacklevel=4)

    def _blame(self, measured: Measured) -> Culprit:
        """Name the culprit of a non-finite norm, count the skip, and raise where that was asked for."""
        self._culprit = find_culprit(self._plan, norms_of(self._plan, measured))
        if self._nonfinite == "raise":
            raise nonfinite(self._plan.p, self._culprit, "To skip such steps on all ranks, say nonfinite='skip'")
        if self._nonfinite == "skip":
            self._skips += 1
            if self._max_consecutive_skips is not None and self._skips > self._max_consecutive_skips:
                raise NonFiniteError(
                    f"{self._skips} steps in a row had a norm that is not finite: {self._culprit}; "
                    f"max_consecutive_skips={self._max_consecutive_skips} allows no more"
                )
        return self._culprit

    def _read_late_flags(self) -> None:
        """The one fixed place where a step decided on an accelerator is looked at, by waiting and never by a query."""
        if self._unread is None or in_capture(self._plan.device):
            return
        (flags, measured), self._unread = self._unread, None
        own, norm, disagree, faults = measured.reduced.sent(flags.read())
        if disagree:
            raise LayoutError(DISAGREE)
        if not isfinite(norm):
            self._blame(measured)
            return
        self._note_finite(norm, measured.norms is not None and len(measured.norms.indices) > 0)
        compare_copies(self._plan, norm, own, f"step {self._steps - 1}", warns=False)  # this call raises
        if any(faults):
            raise refusal_of(faults[0], self._policy)

    def _apply(self, outcome: Outcome, gradients: Sequence[Tensor]) -> None:
        """Scale and clamp ``gradients``; with numbers on the host, only where something changes."""
        if outcome.skip is True:
            return
        for factor in outcome.factors:
            scale_(gradients, factor)
        if outcome.bounds is not None:
            unless = outcome.skip if isinstance(outcome.skip, Tensor) else None
            low, high = outcome.bounds
            clamp_(gradients, low, high, unless)

    def _not_folded(self, measured: Measured, folds: Folds) -> Sequence[Tensor]:
        """The gradients that no folding optimizer scales, those that no optimizer holds included."""
        if not folds.inside:
            return measured.runs
        if folds.inside >= self._ids:
            return ()
        pairs = zip(self._holders, measured.gradients, strict=True)
        plan, left = self._plan, [None if id(holder) in folds.inside else g for holder, g in pairs]
        return look(plan.pieces, plan.sources, plan.replicas, left).parts()
