"""One call of a Clipper, from measured gradients to what the optimizers are told; and the seam for whoever calls it.

[Note: the seam]
Whatever calls a Clipper in its user's place (`attach`, the integrations, an optimizer that reduces gradients itself)
uses these names of the rooms `ranks`, `gradients`, `plan`, `optimizers` and `step`, and subclasses nothing:

* ``engine.Engine``: the verbs ``measure``, ``clip_``, ``begin``, ``decide`` and ``step``; ``owner.note`` and
  ``broken_off.note``; ``plan``, ``policy``, ``holders``, ``owner.clipped`` and ``progress.report`` to read.
  ``options.Options``: the keywords of a user that it takes.
* ``optimizers.fused.Stepping`` and its ``around(index, optimizer)``: what the step of an optimizer runs inside of;
  ``decision.Outcome`` and its ``apply_to(gradients)``: a decision that is applied later.
* ``driver.Driver`` and ``Clipper.of(engine, driver)``: the Clipper that the user gets, and what its methods then do.
* ``gradients.storage.Storage``: gradients that are not in ``.grad``.
* ``optimizers.hooks``: ``guard``, with ``Arguments`` and ``SKIP`` for what it calls, ``watch``, ``skip_next_step``,
  ``held_by`` and ``withhold``; ``optimizers.scaler``: ``unscale_``, ``is_unscaled``, ``has_begun``;
  ``optimizers.wrapped``: ``refuse_before``, ``applying``, ``around`` and ``steps``.
* ``plan.arguments.Parameters``: what torch's own functions call parameters.

Nothing in this room communicates by itself; what ranks must agree on travels in the plan's measurement.
"""
