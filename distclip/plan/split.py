"""Comparing what ``split_over`` or ``layout`` describe: pieces that are not the same list on every rank.

Checksums of gradients travel, never gradients: those of the same shape and bits are one gradient, whose shares on
all ranks must add up to 1.
"""

from collections.abc import Sequence
from hashlib import blake2b

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import and_more
from ..kernels.dtypes import as_real
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
FEW_ELEMENTS = 4  # gradients of fewer may have the same bits by chance: two scalars in bf16 about once in 2,000
HASH = 1 << 48  # a key is this times its kind, and a hash below it
EXACTLY, AT_LEAST, AT_MOST = range(3)  # kinds of keys: shares must add up to 1, to no less, to no more


def compare_axes(plan: Plan, holders: Sequence[Tensor], measured: Measured) -> None:
    """Raise LayoutError, on every rank, where ranks along ``split_over`` hold one parameter, and count it twice.

    Norm layers of hand-made tensor parallelism do, and weights that are tied across stages. Parameters are the same
    whose values and gradients have the same shape and bits, on ranks that hold the same part of them. Values that are
    all one number, as zeros at the start, tell nothing: a later call does. The ``FEW_SMALL`` smallest and ``FEW_LARGE``
    largest of each rank are looked at. Two collectives for each doubling of the number of ranks, of a few numbers a
    parameter ([Note: adding by key] in ranks/by_key.py), an all-reduce of one number, and host syncs.
    """
    pieces = plan.pieces
    here = sorted((i for i in plan.by_split_over if pieces[i].here), key=lambda i: pieces[i].here)
    chosen = frozenset([*here[:FEW_SMALL], *here[-FEW_LARGE:]])
    norms = norms_of(plan, measured, chosen)
    found = zip(norms.indices, norms.parts, norms.norms.tolist(), strict=True)
    shown = [(i, part, norm) for i, part, norm in found if i in chosen and norm > 0]
    values = [_values(plan, holders, i) for i, _, _ in shown]
    telling = [not is_constant(each) for each in values]
    sums = checksums([part for _, part, _ in shown], plan.device) + HASHES * checksums(values, plan.device)
    keys = [
        (i, _key(plan, i, part, norm, total, AT_MOST))
        for (i, part, norm), total, tells in zip(shown, sums.tolist(), telling, strict=True)
        if tells
    ]
    _count(plan, keys)


def count_split(plan: Plan, holders: Sequence[Tensor], found: Norms) -> None:
    """Gradients of the same shape and bits are one gradient: its shares on all ranks must add up to 1.

    Those of fewer than ``FEW_ELEMENTS`` may add up to more, unless the values of their parameters are the same too; a
    lone number of 16 bits, which is often equal by chance, may in any case.

    Collectives and host syncs are those of :func:`compare_axes`, and some host syncs for each gradient of few elements.
    """
    found_here = zip(found.indices, found.parts, found.norms.tolist(), strict=True)
    shown = [(i, part, norm) for i, part, norm in found_here if not plan.known_to_all[i] and norm > 0]
    sums = checksums([part for _, part, _ in shown], plan.device).tolist()
    keys, few = [], []
    for (i, part, norm), total in zip(shown, sums, strict=True):
        is_few = part.numel() < FEW_ELEMENTS
        keys.append((i, _key(plan, i, part, norm, total, AT_LEAST if is_few else EXACTLY)))
        if is_few and not _is_short(part):
            few.append((i, part, norm, total))
    of_values = checksums([_values(plan, holders, i) for i, *_ in few], plan.device).tolist()
    for (i, part, norm, total), of_value in zip(few, of_values, strict=True):
        keys.append((i, _key(plan, i, part, norm, total + HASHES * of_value, AT_MOST)))
    _count(plan, keys)


def _values(plan: Plan, holders: Sequence[Tensor], index: int) -> Tensor:
    return Held(plan.pieces[index], holders[plan.sources[index]]).values()


def _count(plan: Plan, keys: Sequence[tuple[int, int]]) -> None:
    """Raise on every rank where the sum of a key's shares is wrong; the first rank that has the key names its piece.

    ``keys``: pieces, and a key of each. It counts once a rank, which may hold twins, such as biases that are added to
    the same stream. Collectives: [Note: adding by key] and an all-reduce; five more where some are wrong.
    """
    group, device = plan.group, plan.device
    held = add_by_key(group, device, {key: 1 / plan.replicas[i] for i, key in keys})
    firsts = [each.first for key, each in held.items() if _is_wrong(key, each.total)]
    found = torch.tensor([min(firsts, default=group.size)], device=device)
    source = int(all_reduce(group, found, dist.ReduceOp.MIN).item())
    if source == group.size:
        return
    totals = asked(group, device, source, list(dict.fromkeys(key for _, key in keys)), held)
    counted = {i: totals[key] for i, key in keys if group.rank == source and _is_wrong(key, totals[key])}
    listed = and_more([f"{plan.label(i)} ({total:.3g}x)" for i, total in counted.items()])
    text = broadcast_text(group, device, source, listed)
    raise refusals.gradients_not_counted_once(group.ranks[source], text)


def _key(plan: Plan, index: int, gradient: Tensor, norm: float, total: float, kind: int) -> int:
    where = part_of(plan.group, plan.pieces[index])
    text = f"{where}|{tuple(gradient.shape)}|{gradient.dtype}|{norm.hex()}|{total:.0f}"
    return int.from_bytes(blake2b(text.encode(), digest_size=6).digest()) + HASH * kind


def _is_short(gradient: Tensor) -> bool:
    """Whether it is one number that 16 bits hold, as under autocast, once or a few times. Host syncs."""
    values = as_real(gradient)
    rounded = (values.to(dtype).to(values.dtype) for dtype in (torch.bfloat16, torch.float16))
    return is_constant(values) and any(torch.equal(values, each) for each in rounded)


def _is_wrong(key: int, total: float) -> bool:
    kind = key // HASH
    return (total < 1 - TOLERANCE and kind != AT_MOST) or (total > 1 + TOLERANCE and kind != AT_LEAST)
