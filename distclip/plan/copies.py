"""Comparing replicas: ranks said to hold the same parameter or gradient do, by a few numbers for each.

Where all ranks know the same pieces, one word a piece is enough: the representative of the replicas sends its number
times ``1 - replicas``, every other rank its number, and the sum is 0 when replicas are equal.
"""

from collections.abc import Callable, Sequence
from math import inf, isfinite

import torch
from torch import Tensor

from ..errors import warn_user
from ..kernels.transfer import sent
from ..layouts.piece import Held
from ..ranks.compare import projections
from ..ranks.connections import all_reduce
from ..ranks.message import Scalar, root
from . import refusals
from .build import Plan
from .families import ALIKE, WEIGHTY
from .measure import norms_of
from .measured import Measured, Norms

APART = 1e-6  # of the norm: the same gradients have norms that are within 4e-7 of each other, by any of our kernels


def compare_copies(plan: Plan, norm: float, own: Scalar | None, call: str, warns: bool = True) -> None:
    """Where every rank holds all gradients, and no bits are compared: if this rank's norm in ``call`` was not that of
    all, note an error.

    ``norm``: of all ranks, finite. ``own``: what this rank has put in, a number. The further a rank is from the mean,
    the more it sees, and some see nothing: so none raises here, and the next call raises on all. There may be none, so
    a rank that sees a difference ``warns``.
    """
    if not plan.fully_replicated or own is None or plan.copies is not None:
        return
    mine = float(own) if plan.p == inf else float(root(float(own) * plan.group.size, plan.p))
    if abs(mine - norm) > APART * norm:
        plan.memory.late_error = refusals.copies_differ(call, mine)
        if warns:
            warn_user(f"{plan.memory.late_error}. The next call raises on every rank")


def has_copies(plan: Plan) -> bool:
    """Whether there is anything to compare for :func:`compare_gradients`, the same on all ranks."""
    return bool(replicated(plan))


def compare_gradients(plan: Plan, measured: Measured) -> bool:
    """Raise LayoutError, on every rank, where copies of a gradient differ; False where nothing can be said of that.

    Copies differ whose norms, or projections on one direction, are further apart than the arithmetic of bf16 would
    bring them, and so far that the norm of the model is another. Squares of the norms travel too: differences that
    cancel in a sum do not in both. Reads the reduced numbers, so that ranks that disagree part here; then one
    all-reduce of five float64 numbers for each parameter that has copies. Two host syncs on accelerators.
    """
    norm, disagree, _ = measured.reduced.read()
    if disagree or not isfinite(norm):
        return False
    copied = replicated(plan)
    if not copied or norm == 0:
        return True
    found = norms_of(plan, measured, frozenset(copied))
    numbers = norms_and_projections(plan, found, copied) / norm
    words = all_reduce(plan.group, drift_words(numbers, signs_of(plan, copied))).cpu()
    apart = drifted(words, ALIKE, WEIGHTY * ALIKE).nonzero().flatten().tolist()
    if apart:
        raise refusals.not_replicas([plan.label(copied[k]) for k in apart])
    return True


def values_apart(
    plan: Plan, kept: Sequence[Held], sums: Callable[[Sequence[Tensor], torch.device], Tensor]
) -> list[str]:
    """Parameters whose copies hold other values by their ``sums``, the same list on every rank: one all-reduce."""
    if plan.group.process_group is None:
        return []
    copied = replicated(plan)
    values = sums([kept[i].values() for i in copied], plan.device)
    drift = all_reduce(plan.group, values * signs_of(plan, copied))
    return [plan.label(copied[k]) for k in drift.nonzero().flatten().tolist()]


def norms_and_projections(plan: Plan, found: Norms, indices: Sequence[int]) -> Tensor:
    """Two numbers of the gradient of each of these pieces, norm and projection: (2, len(indices)); 0 where none is, and
    a projection of 0 where the gradients have changed since.
    """
    if not indices:
        return plan.weights.new_zeros(2, 0)
    wanted = frozenset(indices)
    shown = [(i, part) for i, part in zip(found.indices, found.parts, strict=False) if i in wanted]
    norms = dict(zip(found.indices, found.norms.unbind(), strict=True))
    along = dict(zip((i for i, _ in shown), projections([part for _, part in shown], plan.device), strict=True))
    none = plan.weights.new_zeros(())  # no list of indices, which would be copied to the device
    rows = torch.stack([numbers.get(i, none) for numbers in (norms, along) for i in indices]).view(2, -1)
    return rows.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def drift_words(numbers: Tensor, signs: Tensor) -> Tensor:
    """What ranks add up to see whether copies of these pieces are equal, by :func:`drifted`: (5, pieces).

    Of norms, their squares and projections the sum over copies less that of their representative; differences
    that cancel in the first do not in the second. And the sums themselves, for the scale.
    """
    size, along = numbers
    return torch.stack([size * signs, size.square() * signs, along * signs, size, size.square()])


def drifted(words: Tensor, tolerance: float, least: float = 0.0) -> Tensor:
    """For which pieces the reduced words of :func:`drift_words` say that copies are further apart: (pieces,) bool."""
    drift, of_squares, along, total, squares = words.abs()
    far = [(drift, total), (of_squares, squares), (along, total)]
    return torch.stack([(off > tolerance * scale) & (off > least) for off, scale in far]).any(0)


def replicated(plan: Plan) -> list[int]:
    """Pieces that other ranks have copies of, which can be compared."""
    return [i for i, p in enumerate(plan.pieces) if plan.known_to_all[i] and p.aligned and plan.replicas[i] > 1]


def signs_of(plan: Plan, indices: Sequence[int]) -> Tensor:
    """1 - replicas on the rank that represents the replicas of a piece, 1 on the others."""
    signs = [1 - plan.replicas[i] if plan.represents[i] else 1 for i in indices]
    return sent(torch.tensor(signs, dtype=torch.float64), plan.device)
