"""One call of a Clipper, from measured gradients to the optimizers' steps; and the seam for whoever makes that call.

[Note: the seam]
What calls a Clipper in its user's place (`attach`, the integrations, an optimizer that reduces gradients itself) uses
the public names of `distclip` and those below, and subclasses nothing; docs/howto/extend.md says which of them when.
They may change in a minor version, which CHANGELOG.md then says.

* ``step.engine.Engine``: the verbs ``measure``, ``fingerprint``, ``clip_``, ``begin``, ``decide`` and ``step``;
  ``owner.register``, ``owner.release``, ``owner.clipped``, ``interruption.record`` and ``plan.p``. ``step.options``:
  ``Options``, the keywords of a user, and ``Watch``, the type of one. ``step.signals.Signals``: what is passed with a
  call.
* ``optimizers.fused.Stepping``, which ``begin`` returns: ``step`` steps an optimizer, or does not; ``around`` is what
  its step runs inside where someone else calls it, unless it is ``skipped``.
* ``step.decision.Outcome``, which ``decide`` returns: ``report`` and ``skip``; ``apply_to`` scales what it is handed,
  for example its ``gradients``, and takes other tensors after ``scaled_by_unit``; ``without_gradients`` may be kept.
* ``step.driver.Driver`` and ``Clipper.of``: the Clipper that the user gets, and what its methods then do;
  ``Clipper.engine``.
* ``gradients.storage.Storage``: gradients that are not in ``grad``.
* ``optimizers.hooks``: ``guard``, with ``Arguments`` and ``SKIP`` for what it calls, ``watch``, ``parameters_of``,
  ``versions_of`` and ``withhold``. ``optimizers.scaler``: ``unscale_``, ``is_unscaled`` and ``needs_update``.
  ``optimizers.wrapped``: ``refuse_clip_before_step``, ``clip_target``, ``with_inner`` and ``is_optimizer``.
* ``policies.adopt``: ``bound_by_place`` and ``without_signals``, to check a policy before there is an engine.
  ``errors.warn_user``: a warning at the user's line.
* ``plan.arguments.Parameters``: what torch's own functions call parameters. ``layouts.layout.LayoutFn``: the type of
  ``layout``. ``layouts.fsdp1.is_flattened``: whether FSDP1 manages a parameter.
* ``telemetry.window.Window``, with ``telemetry.record.Record`` for what it returns: the numbers of steps for a
  framework's own logger, when that logs.

[Note: the phases]
Where each phase of :meth:`.Clipper.step` is, and what it makes (Engine.begin goes through 2 to 8):

    1     step/engine.py: Engine.step                        Folds: which optimizers scale gradients themselves
    2, 3  step/engine.py: _advance; step/progress.py: advance, which goes on to 7
    4     plan/measure.py: measure; plan/contribution.py     Local -> Norms -> Reduced (one all-reduce) -> Measured
    5     step/decision.py: decided_on_host, _on_device      Statistics (step/by_unit.py) -> Outcome, the next state
    6, 7  step/progress.py: _check or _check_later; _commit  Outcome, in numbers where checked; then its Report counts
    8, 9  step/engine.py: begin; optimizers/fused.py: step   Stepping, which steps each optimizer or none

What an Engine is given is read in step/building.py. Nothing here communicates by itself; what ranks must agree
on travels in the plan's measurement, or where an Engine is built in plan/construction.py.
"""
