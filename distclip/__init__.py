"""distclip: gradient clipping by the true global norm, whatever the parallelism.

[Note: collectives and host syncs]

Construction compares the parameters, the settings and the policy of all ranks, by two all-reduces of one or two
float64 numbers a parameter. Every ``measure``, ``clip_`` and ``step`` then makes one all-reduce of two float64 numbers
(three int64 for p = inf), under DDP too, so that ranks decide alike even when one replica is corrupt. In addition:

* Where ``watch`` or the policy ask for finer norms, the first number becomes one for each parameter, for each row if
  any are asked for, or, if only groups are, for each set of groups that some parameter is in; twice as many if norms of
  parameters' values are asked for too. Each signal adds one. Construction then makes three all-reduces more, and a
  fourth where ranks hold different parameters, whose names and sizes it exchanges.
* Every ``fingerprint_every`` steps one all-reduce of two int64 numbers a parameter follows, with one host sync, two on
  accelerators; none in a captured CUDA graph. Construction makes three all-reduces more, or four.
* With ``exact=True`` it is 138 int64 numbers, for p = 1 and 2, and a host sync.
* With DTensors that FSDP2 does not manage, ``split_over`` or ``layout``, the message carries two flags more: some rank
  holds float64; some gradient is misplaced, so that its placements are not its parameter's (sequence-parallel norms
  leave pending sums). Misplaced gradients are redistributed into ``.grad``, in later calls before the all-reduce.
* Calls 1, 2, 4, 8, ... of ``clip_`` and ``step``, counted from construction or a loaded state, compare replicas of
  gradients before anything is scaled: one all-reduce more, of six numbers for each replicated parameter; along
  ``split_over`` another, of one number, and for each doubling of the number of ranks two all-to-alls, in which a rank
  sends a few numbers a parameter to one other. LayoutError on all ranks where replicas differ (a missing reduction,
  experts taken for replicas), or where ranks along ``split_over`` hold the same values and gradients. If the norm was
  not finite, the next call compares instead.
* ``verify_every=N`` adds what :meth:`Clipper.verify` communicates to each Nth call of ``clip_`` and ``step``.
* In every call on the CPU with p < inf, and in others where ``on_drift`` asks for it, the bits of copies are compared,
  in the same numbers of the same all-reduce (on accelerators one more number, for p = inf two more, and two more while
  some copies are compared by amount). Only where they differ four
  all-reduces follow: was it that, and which parameter, on which ranks, and its name. Copies that had the same bits once
  must have them in every later call; others, which each rank computes for itself, may be 1 % apart. p = inf and ranks
  that hold copies of different parameters: only those that all ranks hold. With ``on_drift="ignore"`` no bits are
  compared: if every rank holds all gradients and one rank's norm is 1e-6 off, that rank warns, and the next call raises
  on all ranks. Construction finds out which ranks hold copies, by two all-reduces where not all do.
* On a norm that is not finite three small all-reduces find the culprit; none where norms of parameters or rows name it.

On an accelerator there is no host sync, except for ``nonfinite="raise"``, ``step`` with an optimizer that cannot fold,
float64 gradients, p > 7, the two flags, and messages that go through the host (Gloo, and devices without float64): one
a step for all of these together, two with the flags, and one more where bits of copies do. Comparing replicas costs two
more, in those few calls. Gradients on the host beside those on an accelerator wait for their coefficient.

Without a host sync, non-finite norms, disagreement and bad answers of a policy are checked when the next call starts,
so that the error and :attr:`Clipper.culprit` come one call late. A bad answer skips its step; for that, a policy of
your own costs a host sync under ``"propagate"`` too if an optimizer cannot fold. A coefficient below float32's normal
numbers becomes the smallest of them where the host does not know it, and one above its inverse becomes that; elsewhere
they are exact. While a CUDA graph is captured nothing is checked (RuntimeError where it must be), and a replay is no
call: it advances the policy, but counts no step.

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
