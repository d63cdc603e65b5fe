"""Who holds what: how many ranks hold each element of a parameter, whatever wrapped the model.

Reads parameters and their metadata (DTensor, FSDP1, FSDP2), never a gradient. Private torch API about wrappers is here;
`refusals` has all errors of the package.

[Note: a new sharding]
These places, in the order of a reader, know a placement or a wrapper by name; each cites this note. All others see a
*piece* ([Note: pieces] in plan/__init__.py) and its `spec`, `flat_over`, `flattened`, `start`, `span` and `reduced`.

A placement of DTensors:

* `cuts` in layouts/piece.py: whether ranks along its axis hold different elements. What does not cut and is not
  Replicate is refused by layouts/layout.py.
* `along` in layouts/rows.py: which indices along a dim it leaves to a rank.
* `held_gradient` in layouts/piece.py and `clip_grad_value_` in functional.py: pending sums.
* `cut_locally` in gradients/realign.py: whether a copy can be cut to it without communication; `_digit` and `_decode`:
  its code, where a gradient may lie so while its parameter does not.

A wrapper:

* A file beside fsdp1.py and fsdp2.py: which parameters it manages, and the pieces of them that this rank has.
* `_held_in_part` in layouts/model.py: its modules, and what it adds to names; `held_parameter` in layouts/piece.py: the
  marks that it leaves on parameters.
* `plan_of` and `_held_tensors` in plan/arguments.py: its parameters without their module, which may not tell of what
  they are a part; `tell_ranks` there: whether a call that failed on one rank would have communicated.
* `Inventory` in layouts/model.py and the key of plan/cache.py: what a wrapper shows or takes over later.
* `_made` in plan/culprit.py: whether its gradients are sums over ranks; `Source` in plan/source.py: where they can be
  seen before that.
* `_places` in step/options.py: whether a gradient elsewhere than in ``.grad`` may be a part.

Then one function in tests/support/parallel.py lets every promise of the matrix hold for it.
"""
