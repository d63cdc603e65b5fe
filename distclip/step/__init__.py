"""One call of a Clipper, from measured gradients to the optimizers' steps; and the seam for whoever makes that call.

[Note: the seam]
What calls a Clipper in its user's place (`attach`, the integrations, an optimizer that reduces gradients itself) uses
these names of the rooms `ranks`, `gradients`, `plan`, `optimizers` and `step`, and subclasses nothing:

* ``engine.Engine``: the verbs ``measure``, ``clip_``, ``begin``, ``decide`` and ``step``; ``owner.register`` and
  ``interruption.record``; ``plan``, ``policy``, ``holders``, ``owner.clipped`` and ``progress.report`` to read.
  ``options.Options``: the keywords of a user that it takes.
* ``optimizers.fused.Stepping``, its ``skipped``, ``step(index, optimizer)``, and ``around(index, optimizer)``: what the
  step of an optimizer runs inside of where someone else calls it;
  ``decision.Outcome`` and its ``apply_to(gradients)``: a decision that is applied later.
* ``driver.Driver`` and ``Clipper.of(engine, driver)``: the Clipper that the user gets, and what its methods then do.
* ``gradients.storage.Storage``: gradients that are not in ``.grad``.
* ``optimizers.hooks``: ``guard``, with ``Arguments`` and ``SKIP`` for what it calls, ``watch``, ``skip_next_step``,
  ``parameters_of`` and ``withhold``; ``optimizers.scaler``: ``unscale_``, ``is_unscaled``, ``needs_update``;
  ``optimizers.wrapped``: ``refuse_clip_before_step``, ``clip_target``, ``with_inner`` and ``is_optimizer``.
* ``plan.arguments.Parameters``: what torch's own functions call parameters.

Nothing in this room communicates by itself; what ranks must agree on travels in the plan's measurement.
"""
