"""Clipper: a plan and a policy, the object that a training loop holds."""

from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .gradients.storage import GradientFn
from .layouts.layout import LayoutFn
from .layouts.model import ParameterFilter
from .policies import Policy
from .policies.adopt import bound_by_place, without_signals
from .ranks.group import Axis
from .report import Fingerprint, Report
from .shield import untraced
from .step import refusals
from .step.driver import Driver
from .step.engine import Engine
from .step.nonfinite import Nonfinite
from .step.options import OnDrift, Watch
from .step.progress import ReportHook
from .step.read_only import ReadOnly
from .step.signals import Signals


class Clipper:
    """Clips by the true global norm.

    Build one on every rank, from the wrapped model, after its weights are loaded. Then call :meth:`step` in place of
    ``optimizer.step()``, on every rank, after the last backward of a step:

    >>> import torch
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> clipper = Clipper(model, 1.0)
    >>> (model.weight * 4 - model.bias * 3).sum().backward()
    >>> report = clipper.step(optimizer)
    >>> round(report.norm.item(), 4), round(report.coef.item(), 4)
    (11.3578, 0.088)

    A norm that is NaN or inf skips the step on all ranks, and ``report.culprit`` says why. :meth:`clip_` only scales,
    for loops that step by themselves; :meth:`measure` changes nothing; :meth:`verify` proves the layout once.
    :meth:`state_dict` belongs in the checkpoint.

    * ``model``: one module, or the parts this rank holds (pipeline stages). Parameters are read once, here.
    * ``policy``: a :class:`Policy`, or a number, which means :class:`MaxNorm`.
    * ``group``: the ranks that take part; None is the default group, and every one of its ranks must make every call.
    * ``split_over``: 1-D mesh slices or process groups whose ranks hold *different* parameters (``mesh["pp"]``).
    * ``layout``: ``(name, parameter) -> Layout | None``, for parameters that metadata does not describe.
    * ``only``: ``(name, parameter) -> bool``, which parameters are in the norm and are scaled; None means all. The
      others are not scaled, but a step that is skipped skips them too.
    * ``norm_type``: p > 0, or inf. 1, 2, 3 and inf are right from 1e-30 to 1e30; at p = 100 a norm below 8e-4 is lost.
    * ``nonfinite``: what a norm that is not finite does. ``"skip"``: no rank steps and gradients stay as they are.
      ``"raise"``: NonFiniteError on every rank, gradients untouched. ``"propagate"``: scale and step, as torch does.
    * ``max_consecutive_skips``: at most so many non-finite steps in a row are skipped; the next raises
      NonFiniteError.
    * ``gradients``: where they are, if not in ``.grad``: the name of another attribute of the parameters
      (``"main_grad"``), or ``(name, parameter) -> Tensor | None``. They are scaled in place before the optimizers step,
      and a GradScaler cannot unscale them.
    * ``watch``: whose norms are in ``report.norms``, measured in the same all-reduce: ``"parameters"``, or groups of
      them by patterns of their names: ``{"experts": "*.experts.*", "head": ("head.*", "embed.*")}``.
    * ``watch_zeros``: count zeros among their elements too, for ``report.zeros``: a share of each, 0 to 1.
    * ``exact``: compute the float64 number nearest to the true norm, p = 1, 2 or inf: the same bits in any layout. A
      host sync a call on accelerators; not with ``watch``, nor with policies that need more than the norm.
    * ``fingerprint_every``: in steps N, 2 N, ... the report has a ``fingerprint``, as :meth:`fingerprint` makes it.
    * ``verify_every``: :meth:`verify` in steps N, 2 N, ..., on the gradients that the step is about to clip.
    * ``on_drift``: where replicas of a gradient differ by a bit, ``"warn"`` (raise if by 1 %), ``"raise"`` LayoutError
      before gradients change, or ``"ignore"`` it. None: ``"warn"`` on CPUs with p < inf, else ``"ignore"``.

    LayoutError or ValueError on all ranks where they differ in parameters, values of replicas or settings; ValueError
    for a policy's answer that no step can use. What is communicated, and when the host waits: :mod:`distclip`.
    """

    engine: Engine
    _driver: Driver | None

    policy = ReadOnly(
        lambda engine: engine.policy,
        "The policy that it was built with. It cannot be replaced, since all ranks have agreed on it.",
        refusals.POLICY_IS_FIXED,
    )
    max_norm = ReadOnly(
        lambda engine: engine.policy.max_norm,  # type: ignore[attr-defined]
        "The bound of a Clipper that was built with a number; AttributeError with another policy.",
        refusals.POLICY_IS_FIXED,
    )
    report = ReadOnly(
        lambda engine: engine.progress.report,
        "Of the latest ``clip_`` or ``step``, whoever called it; None before, and where a GradScaler itself skips.",
    )
    steps = ReadOnly(
        lambda engine: engine.progress.calls.steps,
        "How many times ``clip_`` or ``step`` were called. While it does not grow, ``report`` is of an older step.",
    )
    history = ReadOnly(
        lambda engine: engine.progress.recorder.read(),
        "All steps so far: a copy of the :class:`History`; one host sync if the decision is on an accelerator.",
    )
    culprit = ReadOnly(
        lambda engine: engine.progress.streak.culprit,
        "The cause of a norm that was not finite, in the latest ``clip_`` or ``step``; None if it was finite.",
    )

    @bound_by_place("Clipper(model, {})")
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
        nonfinite: Nonfinite = "skip",
        max_consecutive_skips: int | None = None,
        gradients: str | GradientFn | None = None,
        watch: Watch | None = None,
        watch_zeros: bool = False,
        exact: bool = False,
        fingerprint_every: int | None = None,
        verify_every: int | None = None,
        on_drift: OnDrift | None = None,
    ) -> None:
        self.engine = Engine(
            model,
            policy,
            group=group,
            split_over=split_over,
            layout=layout,
            only=only,
            norm_type=norm_type,
            nonfinite=nonfinite,
            max_consecutive_skips=max_consecutive_skips,
            gradients=gradients,
            watch=watch,
            watch_zeros=watch_zeros,
            exact=exact,
            fingerprint_every=fingerprint_every,
            verify_every=verify_every,
            on_drift=on_drift,
        )
        self._driver = None

    @classmethod
    def of(cls, engine: Engine, driver: Driver | None = None) -> "Clipper":
        """The Clipper of an ``engine`` that a ``driver`` calls: for frameworks (see :mod:`distclip.step`).

        ValueError for a policy that asks for signals where the user makes no call to pass them in.
        """
        if not isinstance(engine, Engine):
            raise refusals.no_engine(engine)
        if driver is not None and driver.clip_ is None and driver.step is None:  # its user makes no call
            without_signals(engine.policy, driver.name)
        clipper = cls.__new__(cls)
        clipper.engine, clipper._driver = engine, driver
        return clipper

    def __repr__(self) -> str:
        """Policy, parameters, ranks and steps; no host sync."""
        plan, driven = self.engine.plan, f", called by {self._driver.name}" if self._driver is not None else ""
        return (
            f"{type(self).__name__}({self.policy!r}, norm_type={plan.p:g}, {len(plan.pieces)} parameters, "
            f"{plan.group.size} rank{'s' if plan.group.size > 1 else ''}, {self.steps} steps{driven})"
        )

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """TypeError: a copy would clip a model that the loop does not train."""
        raise refusals.not_copied(type(self).__name__)

    @untraced
    def measure(self, *, signals: Signals | None = None) -> Report:
        """Norm and decision for the gradients as they are, loss scale included; neither policy nor counters advance.

        Nothing changes but this: gradients that are misplaced, or that cannot be scaled in place, may be replaced by
        equal ones, and the previous step is checked if the host did not wait for it (its errors are raised here). One
        all-reduce. Ranks that disagree get a LayoutError on the CPU, a norm of NaN on accelerators.
        """
        report: Report = self._call("measure")(**_said(signals))
        return report

    @untraced
    def clip_(self, *, signals: Signals | None = None) -> Report:
        """Scale (or clamp) the gradients in place as the policy decides, and advance the policy once.

        Call it after the last backward of a step, after unscaling, before ``optimizer.step()``, and do not step where
        ``report.skip`` is true. Gradients keep their bits then, and where the coefficient is 1. One all-reduce (on a
        non-finite norm three more).
        """
        report: Report = self._call("clip_")(**_said(signals))
        return report

    @untraced
    def step(self, *optimizers: Optimizer, scaler: GradScaler | None = None, signals: Signals | None = None) -> Report:
        """Clip and step every optimizer, or skip on all ranks alike; advance the policy once.

        1. Check the optimizers: each steps with the gradients that are there now, and with no others.
        2. Unscale the gradients, if there is a ``scaler``, of every optimizer for which you did not.
        3. Check the previous step, if the host did not wait for it: its errors are raised here.
        4. Measure: one all-reduce (on a non-finite norm three more).
        5. Decide: the policy sees the reduced norm, the same bits on every rank.
        6. Check the decision: one host sync on an accelerator if any optimizer cannot fold. If all can, the next call
           does so, in phase 3.
        7. Commit: the policy's state and the counters advance.
        8. Scale what no optimizer will scale itself. A fused Adam, AdamW, SGD or Adagrad applies the coefficient
           itself, without a pass over the gradients; afterwards the content of ``.grad`` is unspecified.
        9. Step, or skip.

        Gradients that none of the optimizers holds are in the norm and scaled too: a discriminator's, in a step of the
        generator, unless they were set to None or it has a Clipper of its own (``attach`` leaves them out). With a
        ``scaler``, a norm that is not finite on any rank lowers the scale of all ranks at your ``scaler.update()``; a
        skip for the policy's own reason does not.
        """
        report: Report = self._call("step")(*optimizers, scaler=scaler, **_said(signals))
        return report

    @untraced
    def fingerprint(self) -> Fingerprint:
        """One number of 64 bits for the gradient of each parameter as it is now, loss scale included, and one for all.

        It depends on every bit of every element and its place in the whole parameter: the same gradients have the same
        numbers in any layout, and a flipped bit changes them. The dtype counts; None adds 0, a sparse gradient counts
        as a dense one. Two all-reduces, the second of two int64 numbers a parameter, and a host sync; in the first call
        up to four more, of names. LayoutError on all ranks where the layout does not tell who holds what.
        """
        return self._call("fingerprint")()  # type: ignore[no-any-return]

    @untraced
    def verify(self) -> None:
        """Prove the layout on the gradients of a backward, before the step; LayoutError on all ranks if it is wrong.

        * The norm's own sum, with 1 in place of ``|g|**p``, must count every parameter's elements once.
        * Replicas of a parameter must hold the same bits, and those of its gradient be equal (not so in ``no_sync``).
        * Where ``split_over`` or ``layout`` say that ranks hold different parameters, gradients of the same shape and
          bits must add up to one: a tied weight on two stages does not. Missed: a lone number that 16 bits hold, equal
          by chance. Refused though right: biases behind branches of zero weight, while their gradients are equal.
        * No other Clipper may hold the same parameters, unless both are known to clip for different optimizers
          (DiLoCo's inner and outer): attached to them, or given them in an earlier step.
        * Norms of groups, parameters or rows must each count the elements of their unit once.

        Three all-reduces of a few numbers a parameter, one more of a number for each norm finer than the model's, and
        host syncs; where ``split_over`` or ``layout`` are of use another, and for each doubling of the number of ranks
        two all-to-alls, whose messages do not grow with it. Gradients are never gathered.
        """
        self._call("verify")()

    def register_report_hook(self, hook: ReportHook) -> RemovableHandle:
        """Call ``hook(report, step)`` on this rank in every ``clip_`` and ``step``, until ``handle.remove()``.

        Once the step is decided, before gradients are scaled; ``step`` counts from 1; not in a captured CUDA graph.
        If a hook raises, this rank does not step, and the next call is a LayoutError on the others.
        """
        handle = RemovableHandle(self.engine.progress.hooks)
        self.engine.progress.hooks[handle.id] = hook
        return handle

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the policy's state and the counters: the same on every rank, for any number of ranks.

        Reads the :attr:`history`. Where the policy needs statistics of parameters or rows, ``"units"`` has the names of
        these parameters.
        """
        return self.engine.progress.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, on any number of ranks; ValueError if it is anything else.

        Every rank must load the same: if one does not, the next call is a LayoutError on all of them. What a new
        Clipper has already may be loaded into it by some ranks alone.
        """
        self.engine.load_state_dict(state)

    def detach(self) -> None:
        """Remove the hooks of :func:`attach`: from now on the optimizers step as if they had never been attached.

        RuntimeError where a framework calls this Clipper and cannot stop; nothing happens where only you call it.
        """
        if self._driver is not None:
            if self._driver.detach is None:
                raise refusals.not_detachable(self._driver.name)
            self._driver.detach()
            self._driver = None

    def _call(self, name: str) -> Callable[..., Any]:
        """What makes this call: the driver, where there is one, or the engine."""
        if self._driver is None:
            return getattr(self.engine, name)  # type: ignore[no-any-return]
        driven: Callable[..., Any] | None = getattr(self._driver, name)
        if driven is None and name in ("clip_", "step"):
            raise refusals.clips_already(self._driver.name)
        return getattr(self.engine, name) if driven is None else driven


def _said(signals: Signals | None) -> dict[str, Any]:
    """As keywords, for who calls the Clipper in its user's place, and may know of none."""
    return {} if signals is None else {"signals": signals}
