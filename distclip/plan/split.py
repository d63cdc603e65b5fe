"""Comparing what ``split_over`` or ``layout`` describe: pieces that are not the same list on every rank.

Checksums of gradients travel, never gradients: those of the same shape and bits are one gradient, whose shares on
all ranks must add up to 1.
"""

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import and_more
from ..layouts.layout import part_of
from ..layouts.piece import Held
from ..ranks.by_key import add_by_key, asked
from ..ranks.compare import HASHES, broadcast_text, checksums, is_constant
from ..ranks.connections import all_reduce
from . import refusals
from .build import Plan
from .measure import norms_of
from .measured import Measured, Norms

FEW_SMALL, FEW_LARGE = 192, 64  # parameters of a rank that are compared along split_over: norm layers and embeddings
TOLERANCE = 1e-5  # of a sum of shares
FEW_ELEMENTS = 4  # gradients of fewer have the same bits by chance: two scalars in bf16 about once in 2,000
BY_CHANCE = 1 << 48  # in the keys of these


def compare_axes(plan: Plan, holders: Sequence[Tensor], measured: Measured) -> None:
    """Raise LayoutError, on every rank, where ranks along ``split_over`` hold one parameter, and count it twice.

    Norm layers of hand-made tensor parallelism do, and weights that are tied across stages. Parameters are the same
    whose values and gradients have the same shape and bits, on ranks that hold the same part of them. Values that are
    all one number, as zeros at the start, tell nothing: a later call does. The ``FEW_SMALL`` smallest and ``FEW_LARGE``
    largest of each rank are looked at. Two collectives for each doubling of the number of ranks, of a few numbers a
    parameter ([Note: adding by key] in ranks/by_key.py), an all-reduce of one number, and host syncs.
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
    _count(plan, keys, lambda key, total: total > 1 + TOLERANCE)


def count_split(plan: Plan, found: Norms) -> None:
    """Gradients of the same shape and bits are one gradient: its shares on all ranks must add up to 1, or, where it has
    fewer than ``FEW_ELEMENTS``, to no less.

    Collectives and host syncs are those of :func:`compare_axes`.
    """
    norms = found.norms.tolist()
    split = [k for k, i in enumerate(found.indices) if not plan.known_to_all[i] and norms[k] > 0]
    sums = checksums([found.parts[k] for k in split], plan.device).long().tolist()
    keys = {
        found.indices[k]: _key(plan, found.indices[k], found.parts[k], norms[k], total)
        for k, total in zip(split, sums, strict=True)
    }
    _count(plan, keys, lambda key, total: total < 1 - TOLERANCE or (total > 1 + TOLERANCE and key < BY_CHANCE))


def _count(plan: Plan, keys: Mapping[int, int], is_wrong: Callable[[int, float], bool]) -> None:
    """Raise on every rank where a key and the sum of its shares are ``is_wrong``; the first rank with one names it.

    ``keys``: of pieces. Each counts once a rank, which may hold twins, such as biases that are added to the same
    stream. Collectives: [Note: adding by key] and an all-reduce; five more where some are wrong.
    """
    group, device = plan.group, plan.device
    held = add_by_key(group, device, {key: 1 / plan.replicas[i] for i, key in keys.items()})
    firsts = [each.first for key, each in held.items() if is_wrong(key, each.total)]
    found = torch.tensor([min(firsts, default=group.size)], device=device)
    source = int(all_reduce(group, found, dist.ReduceOp.MIN).item())
    if source == group.size:
        return
    totals = asked(group, device, source, list(dict.fromkeys(keys.values())), held)
    counted = {i: totals[key] for i, key in keys.items() if group.rank == source and is_wrong(key, totals[key])}
    listed = and_more([f"{plan.label(i)} ({total:.3g}x)" for i, total in counted.items()])
    text = broadcast_text(group, device, source, listed)
    raise refusals.gradients_not_counted_once(group.ranks[source], text)


def _key(plan: Plan, index: int, gradient: Tensor, norm: Tensor | float, total: int) -> int:
    where = part_of(plan.group, plan.pieces[index])
    text = f"{where}|{tuple(gradient.shape)}|{gradient.dtype}|{float(norm).hex()}|{total}"
    key = int.from_bytes(blake2b(text.encode(), digest_size=6).digest())
    return key if gradient.numel() >= FEW_ELEMENTS else key + BY_CHANCE
