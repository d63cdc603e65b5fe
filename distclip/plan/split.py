"""Comparing what ``split_over`` or ``layout`` describe: pieces that are not the same list on every rank.

Checksums of gradients are gathered, never gradients: those of the same shape and bits are one gradient, whose shares on
all ranks must add up to 1.
"""

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import and_more
from ..layouts.layout import part_of
from ..layouts.piece import Held
from ..ranks.compare import HASHES, broadcast_text, checksums, is_constant
from ..ranks.connections import all_reduce
from . import refusals
from .build import Plan
from .measure import norms_of
from .measured import Measured, Norms

FEW_SMALL, FEW_LARGE = 192, 64  # parameters of a rank that are compared along split_over: norm layers and embeddings
TOLERANCE = 1e-5  # of a sum of shares


def compare_axes(plan: Plan, holders: Sequence[Tensor], measured: Measured) -> None:
    """Raise LayoutError, on every rank, where ranks along ``split_over`` hold one parameter, and count it twice.

    Norm layers of hand-made tensor parallelism do, and weights that are tied across stages. Parameters are the same
    whose values and gradients have the same shape and bits, on ranks that hold the same part of them. Values that are
    all one number, as zeros at the start, tell nothing: a later call does. The ``FEW_SMALL`` smallest and ``FEW_LARGE``
    largest of each rank are looked at. Three all-reduces, of a number twice and of two numbers a parameter and rank,
    and host syncs.
    """
    pieces, sources = plan.pieces, plan.sources
    here = sorted((i for i in plan.by_split_over if pieces[i].here), key=lambda i: pieces[i].here)
    chosen = frozenset([*here[:FEW_SMALL], *here[-FEW_LARGE:]])
    norms = norms_of(plan, measured, chosen)
    found = zip(norms.indices, norms.parts, norms.norms.tolist(), strict=True)
    shown = [(i, part, norm) for i, part, norm in found if i in chosen and norm > 0]
    values = [Held(pieces[i], holders[sources[i]]).values() for i, _, _ in shown]
    telling = [not is_constant(each) for each in values]
    sums = checksums([part for _, part, _ in shown], plan.device) + HASHES * checksums(values, plan.device)
    keys = {
        i: _key(plan, i, part, norm, int(total))
        for (i, part, norm), total, tells in zip(shown, sums.tolist(), telling, strict=True)
        if tells
    }
    counted = _summed_shares(plan, list(keys.values()), [1 / plan.replicas[i] for i in keys])
    wrong = [f"{plan.label(i)} ({counted[key]:.3g}x)" for i, key in keys.items() if counted[key] > 1 + TOLERANCE]
    _raise_if_counted(plan, wrong)


def count_split(plan: Plan, found: Norms) -> None:
    """Gradients of the same shape and bits are one gradient: its shares on all ranks must add up to 1."""
    split = [k for k, i in enumerate(found.indices) if not plan.known_to_all[i]]
    sums = checksums([found.parts[k] for k in split], plan.device).long().tolist()
    keys = [
        _key(plan, found.indices[k], found.parts[k], found.norms[k], total)
        for k, total in zip(split, sums, strict=True)
    ]
    counted = _summed_shares(plan, keys, [1 / plan.replicas[found.indices[k]] for k in split])
    wrong = [
        f"{plan.label(found.indices[k])} ({counted[key]:.3g}x)"
        for k, key in zip(split, keys, strict=True)
        if found.norms[k] > 0 and abs(counted[key] - 1) > TOLERANCE
    ]
    _raise_if_counted(plan, wrong)


def _raise_if_counted(plan: Plan, wrong: Sequence[str]) -> None:
    """Raise on every rank what the first of them has found ``wrong``: one all-reduce, and another where some has."""
    first = torch.tensor([plan.group.rank if wrong else plan.group.size], device=plan.device)
    source = int(all_reduce(plan.group, first, dist.ReduceOp.MIN).item())
    if source < plan.group.size:
        listed = broadcast_text(plan.group, plan.device, source, and_more(wrong))
        raise refusals.gradients_not_counted_once(plan.group.ranks[source], listed)


def _summed_shares(plan: Plan, keys: Sequence[int], shares: Sequence[float]) -> Counter[int]:
    """The sum over the group of the share of each key, once a rank: two collectives of a number a key and rank.

    One rank may hold twins, such as biases that are added to the same stream, which no other has.
    """
    group, mine = plan.group, dict(zip(keys, shares, strict=True))
    most = int(all_reduce(group, torch.tensor([len(mine)], device=plan.device), dist.ReduceOp.MAX).item())
    rows = torch.zeros(group.size, 2, most, dtype=torch.float64, device=plan.device)
    rows[group.rank, :, : len(mine)] = torch.tensor([list(mine), list(mine.values())], dtype=torch.float64)
    if most:
        all_reduce(group, rows)
    counted: Counter[int] = Counter()
    for row_keys, row_shares in rows.tolist():
        for key, share in zip(row_keys, row_shares, strict=True):
            counted[int(key)] += share
    return counted


def _key(plan: Plan, index: int, gradient: Tensor, norm: Tensor | float, total: int) -> int:
    where = part_of(plan.group, plan.pieces[index])
    text = f"{where}|{tuple(gradient.shape)}|{gradient.dtype}|{float(norm).hex()}|{total}"
    return int.from_bytes(blake2b(text.encode(), digest_size=6).digest())
