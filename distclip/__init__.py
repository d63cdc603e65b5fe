"""distclip: gradient clipping by the true global norm, whatever the parallelism.

[Note: collectives and host syncs]

Every ``measure``, ``clip_`` and ``step`` makes one all-reduce of two float64 numbers (three int64 for p = inf), under
DDP too, so that all ranks decide alike even when one replica is corrupt. Construction compares parameters, settings and
policy of all ranks, by two all-reduces of one or two float64 numbers a parameter. In addition:

* **Finer norms**, where ``watch`` or the policy ask for them: in place of the number for the norm there is one for each
  parameter; for each row, if any are asked for; or, if only groups are, for each set of groups that some parameter is
  in. Norms of parameters' values double these. Each signal adds one. Construction makes three more all-reduces, and a
  fourth, of names and sizes, where ranks hold different parameters.
* **Fingerprints**: every ``fingerprint_every`` steps an all-reduce of two int64 numbers a parameter, with one host
  sync, two on accelerators; none in a captured CUDA graph. Construction makes three or four more all-reduces.
* ``exact=True``: the message has 138 int64 numbers, for p = 1 and 2, and a host sync reads it.
* **Two flags** join the message with DTensors that FSDP2 does not manage, ``split_over`` or ``layout``: some rank holds
  float64; some gradient is misplaced, which means that its placements are not its parameter's (sequence-parallel norms
  leave pending sums). Misplaced gradients are redistributed into ``.grad``, in later calls before the all-reduce.
* **Replicas of gradients** are compared, before anything is scaled, in calls 1, 2, 4, 8, ... of ``clip_`` and ``step``,
  counted from construction or a loaded state: one more all-reduce, of six numbers for each replicated parameter. Along
  ``split_over`` there is another, of one number, and for each doubling of the number of ranks two all-to-alls, in which
  a rank sends a few numbers a parameter to one other. LayoutError on all ranks where replicas differ (a missing
  reduction, experts taken for replicas), or where ranks along ``split_over`` hold the same values and gradients. If the
  norm was not finite, the next call compares instead.
* ``verify_every=N`` adds what :meth:`Clipper.verify` communicates to each Nth call of ``clip_`` and ``step``.
* **Bits of replicas** are compared in every call on the CPU with p < inf, and elsewhere where ``on_drift`` asks for it,
  in the same all-reduce. On the CPU its numbers serve for that too; accelerators add one, p = inf adds two, and two
  more are added while some replicas are compared by amount. Only where bits differ do four all-reduces follow: whether
  it was that, which parameter, on which ranks, and its name. Replicas that once had the same bits must have them in
  every later call; others, which each rank computes for itself, may be 1 % apart. With p = inf, where ranks hold
  replicas of different parameters, only those that all ranks hold are compared. Construction finds out which ranks hold
  replicas, by two all-reduces where not all do. ``on_drift="ignore"`` compares no bits: if every rank holds all
  gradients and one rank's norm is 1e-6 off, that rank warns, and the next call raises on all ranks.
* **A norm that is not finite**: three small all-reduces find the culprit; none where norms of parameters or rows name
  it.

On an accelerator there is no host sync, with these exceptions: ``nonfinite="raise"``, ``step`` with an optimizer that
cannot apply the coefficient itself (is not fused), float64 gradients, p > 7, the two flags, and messages that go
through the host (Gloo, and devices without float64). All of these together cost one a step, two with the flags, and one
more where bits of replicas do. Comparing replicas costs two more, in those few calls. Gradients on the host beside
those on an accelerator wait for their coefficient.

Without a host sync, non-finite norms, ranks that disagree and unusable answers of a policy are found when the next call
starts, so the error and :attr:`Clipper.culprit` come one call late. The step of an unusable answer is skipped; under
``"propagate"`` that costs a host sync with a policy of your own and an optimizer that is not fused. Where the host does
not know the coefficient, one below float32's normal numbers becomes the smallest of them, and one above the inverse of
that becomes that inverse; elsewhere they are exact. While a CUDA graph is captured nothing is checked (RuntimeError
where it must be), and a replay is no call: it advances the policy, but counts no step.

A call that raises leaves gradients and policy state as they were, except that a GradScaler's gradients are unscaled,
some misplaced gradients may be redistributed, and on an accelerator a fused SGD with momentum that has not stepped may
have got buffers of zeros.
"""

from .attached import attach as attach
from .clipper import Clipper as Clipper
from .errors import LayoutError as LayoutError, NonFiniteError as NonFiniteError
from .functional import (
    clip_grad_norm_ as clip_grad_norm_,
    clip_grad_value_ as clip_grad_value_,
    clip_grads_with_norm_ as clip_grads_with_norm_,
    get_total_norm as get_total_norm,
)
from .layouts.layout import Layout as Layout
from .plan.source import find_source as find_source
from .policies import (
    AGC as AGC,
    AdaGC as AdaGC,
    AutoClip as AutoClip,
    Chain as Chain,
    Cosine as Cosine,
    Decision as Decision,
    MaxNorm as MaxNorm,
    MaxRMS as MaxRMS,
    Normalize as Normalize,
    PerGroup as PerGroup,
    PerParameter as PerParameter,
    Policy as Policy,
    QuantileTracker as QuantileTracker,
    Shadow as Shadow,
    Signal as Signal,
    SkipSpikes as SkipSpikes,
    Smooth as Smooth,
    Statistic as Statistic,
    Statistics as Statistics,
    Units as Units,
    ValueClip as ValueClip,
    Warmup as Warmup,
    ZClip as ZClip,
)
from .report import Fingerprint as Fingerprint, Report as Report
from .step.history import History as History

__version__ = "0.1.0"
