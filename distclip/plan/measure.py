"""Measuring gradients with a plan: local sums, the one all-reduce, and a second round where some were misplaced."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from math import inf
from zlib import crc32

import torch
from torch import Tensor

from ..errors import FAILURES, LayoutError
from ..gradients.local import Local
from ..gradients.realign import realign
from ..gradients.storage import Store
from ..ranks.compare import who_differs
from ..ranks.digits import reduce_digits
from ..ranks.message import CODES, Reduced, reduce_norm
from .build import Plan
from .contribution import NOTHING, Beside, Contribution, contribution, norms_on
from .disagreement import account, missing_in, tell_others
from .drift_word import silence, with_amounts
from .families import NOT_COMPARING, Comparing
from .measured import Measured, Norms

TAG_STEP = 0x9E37  # odd, so that different tags stay different modulo CODES
REALIGNED = 1 << 30  # tag of the second all-reduce of a call that had to realign gradients
LEAST_P = 1 / 16  # below, the root of what 1e15 gradients of 3e38 add up to leaves float64


def measure(
    plan: Plan,
    gradients: Sequence[Tensor | None],
    store: Store | None = None,
    tag: int = 0,
    *,
    realign_first: bool = False,
    unmoved: bool = False,
    error: LayoutError | None = None,
    call: str = "",
    beside: Beside = NOTHING,
    compares: Comparing = NOT_COMPARING,
) -> Measured:
    """Measure ``gradients``, one for each source, None where there is none.

    1. Sum what this rank has, and make it global: one all-reduce if the group has several ranks. ``realign_first``
       realigns misplaced gradients before, which every rank must then do.
    2. Where the flags say that some rank has misplaced gradients, realign them and do the first again.
    3. Raise what this rank has found to be wrong; else hand gradients that were replaced to ``store``, if it is given.

    * ``tag``: mixed into the agreement word, to tell calls apart that must not pair.
    * ``unmoved``: they are the very tensors of the last time, where they were (see :meth:`.Memory.knows`).
    * ``error``: of this rank, raised like its own once it has taken part, with what the others say.
    * ``call``: what errors say of this rank where others do not agree.
    * ``beside``: what travels beside sums of gradients; zeros do without it.
    * ``compares``: of copies, where the plan says which are compared.

    Host syncs: one a round on accelerators where the flags must be read, else none.
    """
    # 1. Sum what this rank has, and make it global. With an error of its own it takes part first: the others wait.
    given, realigned = error, realign_first
    if realign_first:
        gradients, misplaced_for_good = _realigned(plan, gradients, store)
        error = error or misplaced_for_good
    local, made, reduced = _round(plan, gradients, error, tag, call, beside, compares, unmoved)
    wide = plan.wide or local.wide

    # 2. Where some rank has misplaced gradients, realign and do it again: by reduced flags, so all ranks or none.
    if plan.reads_flags:
        _, disagree, (misplaced, wide) = reduced.read()
        if misplaced and not disagree:  # so no rank has an error that could be lost here: it makes ranks disagree
            gradients, error = _realigned(plan, gradients, store)
            local, made, reduced = _round(plan, gradients, error, tag + REALIGNED, call, beside, compares)
            realigned = True

    # 3. Raise what this rank has found to be wrong: all ranks have met, and raise too.
    if local.error is not None:
        # The very object that was given, where it came first: only that does not say yet what the others do.
        raise LayoutError(f"{given}{reduced.who}") if local.error is given else local.error
    if local.instead:
        gradients = _replaced(gradients, local.instead, store)
    dtype = torch.float64 if wide else torch.float32
    can_overflow = wide or 7 < plan.p < inf or plan.p < LEAST_P
    return Measured(
        gradients, local.runs, made.norms, reduced, realigned, dtype, can_overflow, 1.0, made.by_piece, made.bits
    )


def fail_with_others(plan: Plan, failed: Exception, tag: int, call: str, realign_first: bool = False) -> None:
    """Take part in the measurement of the others, who raise as well, where this rank ``failed`` to get at gradients."""
    none = [None] * len(set(plan.sources))
    with suppress(LayoutError):
        measure(plan, none, None, tag, realign_first=realign_first, error=LayoutError(str(failed)), call=call)


def norms_of(plan: Plan, measured: Measured, of: Collection[int] | None = None) -> Norms:
    """The norm of each gradient that was measured: at hand on accelerators, made now on the host.

    ``of``: the pieces that matter, all if None; there may be norms of others too.
    """
    if measured.norms is not None:
        return measured.norms
    local = plan.look(measured.gradients)
    kept = [(part, i) for part, i in zip(local.parts(), local.indices, strict=True) if of is None or i in of]
    return norms_on(plan, [part for part, _ in kept], [i for _, i in kept])


def _round(
    plan: Plan,
    gradients: Sequence[Tensor | None],
    error: LayoutError | None,
    tag: int,
    call: str,
    beside: Beside,
    compares: Comparing,
    unmoved: bool = False,
) -> tuple[Local, Contribution, Reduced]:
    """Sum what this rank has and make it global.

    Where the host knows at once that ranks disagree, all of them ask who it is; if it is none, copies have drifted.
    """
    try:
        local = _found(plan, gradients, error, unmoved)
        made = contribution(plan, gradients, local, beside, compares)
    except FAILURES as failed:  # of torch, of a gradient whose memory was freed for example: the others wait for us
        named = _named(plan, gradients, failed)
        flags = (False, plan.wide) if plan.sends_flags else ()
        tell_others(plan.group, plan.device, plan.p, flags, named, call, plan.length, plan.exact, silence(plan))
        if named is failed:
            raise
        raise named from failed
    flags = (local.misplaced > 0, plan.wide or local.wide) if plan.sends_flags else ()
    missing = missing_in(plan, gradients) if len(local.indices) < len(plan.pieces) else ()
    code = plan.code + tag * TAG_STEP + (crc32(repr(missing).encode()) if missing else 0)
    faulty = local.error is not None
    of_model = 1 if plan.slots is None else plan.slots.count  # the others of a vector only travel along
    if plan.exact:
        assert isinstance(made.mine, Tensor)
        reduced = reduce_digits(plan.group, made.mine, plan.p, code, faulty, flags, call, made.drift)
    else:
        more = plan.fully_replicated, call, of_model, made.drift
        reduced = reduce_norm(plan.group, made.mine, plan.p, code, faulty, flags, *more)
    if reduced.disagree is True:
        mine = account(plan, call, missing, local.error)
        who = who_differs(plan.group, plan.device, mine, 0 if plan.copies is None else code % CODES)
        drifted = reduced.drift is True and not who
        reduced = replace(reduced, who=who, disagree=not drifted, drift=drifted)
    return local, made, with_amounts(plan, reduced, compares.stops)


def _found(plan: Plan, gradients: Sequence[Tensor | None], error: LayoutError | None, unmoved: bool) -> Local:
    """Where ``gradients`` lie: as in the step before, or by a look at each of them."""
    local = None if error is not None else plan.memory.recall(gradients, unmoved)
    if local is not None:
        return local
    local = plan.look(gradients, error)
    return plan.memory.note(gradients, local, plan.pieces, plan.sources, plan.kinds)


def _named(plan: Plan, gradients: Sequence[Tensor | None], failed: Exception) -> Exception:
    """The error to raise: one that names the gradient, if a look at each of them finds it, else ``failed`` itself."""
    try:
        return plan.look(gradients).error or failed
    except FAILURES:
        return failed


def _realigned(
    plan: Plan, gradients: Sequence[Tensor | None], store: Store | None
) -> tuple[Sequence[Tensor | None], LayoutError | None]:
    try:
        moved = realign(plan.pieces, [gradients[source] for source in plan.sources])
    except LayoutError as error:  # raised once this rank has taken part in the next all-reduce
        return gradients, error
    new = {s: g for s, g in zip(plan.sources, moved, strict=True) if g is not None and g is not gradients[s]}
    return _replaced(gradients, new, store), None


def _replaced(
    gradients: Sequence[Tensor | None], instead: dict[int, Tensor], store: Store | None
) -> Sequence[Tensor | None]:
    """``gradients`` with those in ``instead``, which are stored too."""
    if not instead:
        return gradients
    if store is not None:
        for source, gradient in instead.items():
            store(source, gradient)
    return [instead.get(source, gradient) for source, gradient in enumerate(gradients)]
