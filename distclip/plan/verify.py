"""Proving a layout: that ranks said to hold copies do, at construction by values, after a backward by gradients.

The gradients of copies are compared in the first call of a Clipper too, and at doubling intervals after it.

Where all ranks know the same pieces, one word a piece is enough: the rank that speaks for the copies sends its number
times ``1 - replicas``, every other rank its number, and the sum is 0 when copies are equal. Pieces that ``split_over``
or ``layout`` describe are not the same list on every rank; their checksums are gathered (never gradients).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from math import isfinite
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LayoutError
from ..gradients.storage import Storage
from ..kernels.transfer import sent
from ..layouts.layout import part_of, speaks
from ..layouts.piece import Held, once
from ..ranks.compare import HASHES, bit_sums, checksums, differing, is_constant, projections, say, who_differs
from ..ranks.group import ClippingGroup
from .build import Plan, stopped_by
from .measured import Measured, Norms

SHOWN = 5  # names in an error
FEW_SMALL, FEW_LARGE = 192, 64  # parameters of a rank that are compared along split_over: norm layers and embeddings
ERROR = "an error of its own"
VERIFYING = 1 << 13  # tag of its measurement
TOLERANCE = 1e-5  # copies of a gradient may differ in their last bits where a kernel adds in any order
ALIKE = 1e-2  # copies that were computed in bf16, each for itself, may be so far apart
WEIGHTY = 0.1  # of the tolerance: by how much of the model's norm copies must differ, or noise around 0 would be told
SAY_SO = (
    "say layout=... (distclip.Layout.cut(over=[tp])) where ranks hold different parts of these parameters, or "
    "split_over=[mesh['pp']] where all that they hold is different"
)


ABSENT = (
    "an optimizer in the backward has used them up, the last synchronisation was left out "
    "(set_requires_gradient_sync(False), set_requires_all_reduce(False)), or zero_grad came before; clip between the "
    "last backward and zero_grad"
)


def compare_ranks(plan: Plan, listed: Sequence[Held], settings: Mapping[str, str]) -> None:
    """Raise on every rank unless parameters, ``settings`` and the values of copies are the same on all of them.

    LayoutError for parameters and values, or where a rank called :func:`tell_ranks` instead; ValueError for settings.
    Two all-reduces, each with a wait.
    """
    different = differing(plan.group, plan.device, _fields(settings, plan.code))
    if ERROR in different:
        raise LayoutError(f"a rank of the clipping group could not make its Clipper{_who(plan, 'made its Clipper')}")
    if "parameters" in different:
        common = [piece for piece, is_common in zip(plan.pieces, plan.common, strict=True) if is_common]
        count = sum(piece.here if piece.size is None else piece.size for piece in common)
        mine = f"{len(common)} parameters of {count} elements (hash {plan.code:x})"
        raise LayoutError(
            "the ranks of the clipping group hold parameters of other names, shapes, dtypes or placements: say which "
            f"ranks hold different ones by split_over=[mesh['pp']] or layout=...{_who(plan, mine)}"
        )
    if different:
        mine = ", ".join(f"{name} {settings[name]}" for name in different)
        raise ValueError(
            f"{', '.join(different)} must be the same on every rank: build every Clipper alike{_who(plan, mine)}"
        )
    apart = _apart(plan, once(listed), checksums)
    if apart:
        raise LayoutError(
            f"ranks that should hold copies hold other values of {_few(apart)}: {SAY_SO}, only=... where nobody trains "
            "them, and build the Clipper after parameters are loaded or broadcast"
        )


def tell_ranks(group: ClippingGroup, device: torch.device, settings: Mapping[str, str], error: Exception) -> None:
    """In place of :func:`compare_ranks`, on a rank that is about to raise ``error``: the others raise as well."""
    if differing(group, device, _fields(settings, failed=True)):
        who_differs(group, device, stopped_by(error))


def _fields(settings: Mapping[str, str], code: int = 0, failed: bool = False) -> dict[str, float]:
    numbers: dict[str, float] = {name: crc32(text.encode()) for name, text in settings.items()}
    return {**numbers, "parameters": code, ERROR: failed}


def _who(plan: Plan, mine: str) -> str:
    return who_differs(plan.group, plan.device, mine)


def _apart(plan: Plan, kept: Sequence[Held], sums: Callable[[Sequence[Tensor], torch.device], Tensor]) -> list[str]:
    """Parameters whose copies hold other values by their ``sums``, the same list on every rank: one all-reduce."""
    if plan.group.process_group is None:
        return []
    copied = _copied(plan)
    values = sums([kept[i].values() for i in copied], plan.device)
    drift = plan.group.all_reduce(values * _signs(plan, copied))
    return [plan.label(copied[k]) for k in drift.nonzero().flatten().tolist()]


def verify(
    plan: Plan,
    holders: Sequence[Tensor],
    storage: Storage,
    fault: LayoutError | None = None,
    tag: int = 0,
    call: str = "verify()",
) -> None:
    """Raise LayoutError, on every rank of the group, unless the layout holds for the gradients there are.

    ``fault``: what this rank knows to be wrong already. ``tag``, ``call``: of who calls, as in :meth:`Plan.measure`.
    """
    measured = plan.measure(storage.read(), storage.store, tag=VERIFYING + tag, fault=fault, call=call)
    if measured.reduced.read()[1]:
        raise LayoutError(
            f"the ranks do not agree: let every rank make the same calls with the same parameters{measured.reduced.who}"
        )
    kept = [Held(piece, holders[source]) for piece, source in zip(plan.pieces, plan.sources, strict=True)]
    apart = _apart(plan, kept, bit_sums)
    if apart:
        raise LayoutError(
            f"copies have drifted apart: ranks hold other values of {_few(apart)}; load or broadcast these parameters "
            f"anew, or {SAY_SO}"
        )
    norms = plan.norms(measured)
    _count_common(plan, norms)
    _count_split(plan, norms)


def has_copies(plan: Plan) -> bool:
    """Whether there is anything to compare for :func:`compare_gradients`, the same on all ranks."""
    return bool(_copied(plan))


def compare_gradients(plan: Plan, measured: Measured) -> bool:
    """Raise LayoutError, on every rank, where copies of a gradient differ; False where nothing can be said of that.

    Copies differ whose norms, or projections on one direction, are further apart than the arithmetic of bf16 would
    bring them, and so far that the norm of the model is another. Squares of the norms travel too: differences that
    cancel in a sum do not in both. Reads the reduced words, so that ranks that disagree part here; then one all-reduce
    of five float64 words for each parameter that has copies. Two waits on accelerators.
    """
    norm, disagree, _ = measured.reduced.read()
    if disagree or not isfinite(norm):
        return False
    copied = _copied(plan)
    if not copied or norm == 0:
        return True
    found = plan.norms(measured, frozenset(copied))
    words = plan.group.all_reduce(_told(plan, _numbers(plan, found, copied) / norm, copied)).cpu()
    apart = _differ(words, ALIKE, WEIGHTY * ALIKE).nonzero().flatten().tolist()
    if apart:
        raise _not_copies([plan.label(copied[k]) for k in apart])
    return True


def _numbers(plan: Plan, found: Norms, indices: Sequence[int]) -> Tensor:
    """Two numbers of the gradient of each of these pieces, norm and projection: (2, len(indices)); 0 where none is."""
    if not indices:
        return plan.weights.new_zeros(2, 0)
    wanted = frozenset(indices)
    shown = [(i, part) for i, part in zip(found.indices, found.parts, strict=True) if i in wanted]
    norms = dict(zip(found.indices, found.norms.unbind(), strict=True))
    along = dict(zip((i for i, _ in shown), projections([part for _, part in shown], plan.device), strict=True))
    none = plan.weights.new_zeros(())  # no list of indices, which would be copied to the device
    rows = torch.stack([numbers.get(i, none) for numbers in (norms, along) for i in indices]).view(2, -1)
    return rows.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _told(plan: Plan, numbers: Tensor, indices: Sequence[int]) -> Tensor:
    """What ranks add up to see whether copies of these pieces are equal, by :func:`_differ`: (5, len(indices)).

    Of norms, their squares and projections the sum over copies less that of the one that speaks for them; differences
    that cancel in the first do not in the second. And the sums themselves, for the scale.
    """
    (size, along), signs = numbers, _signs(plan, indices)
    return torch.stack([size * signs, size.square() * signs, along * signs, size, size.square()])


def _differ(words: Tensor, tolerance: float, least: float = 0.0) -> Tensor:
    """For which pieces the reduced words of :func:`_told` say that copies are further apart: (pieces,) bool."""
    drift, of_squares, along, total, squares = words.abs()
    far = [(drift, total), (of_squares, squares), (along, total)]
    return torch.stack([(off > tolerance * scale) & (off > least) for off, scale in far]).any(0)


def _not_copies(names: Sequence[str]) -> LayoutError:
    return LayoutError(
        f"ranks that should hold the same gradient do not: {_few(names)}; reduce gradients before clipping (leave "
        "no_sync for the last backward; an optimizer that reduces them in its step() comes too late), or say "
        "layout=lambda name, p: distclip.Layout(1) if ... else None for what each rank has for itself (experts), "
        "split_over=[mesh['pp']] for stages, group=... for ranks that train apart (local SGD, DiLoCo)"
    )


def _count_common(plan: Plan, found: Norms) -> None:
    """There are gradients, every element counts once, and copies of a gradient are equal.

    One all-reduce of six words a piece, and two.
    """
    common = [i for i, is_common in enumerate(plan.common) if is_common]
    sizes = [float(plan.pieces[i].here) for i in common]
    counted = torch.tensor(sizes, dtype=torch.float64, device=plan.device) * plan.weights[common]
    comparable = torch.tensor([float(plan.pieces[i].aligned) for i in common], device=plan.device)
    told = _told(plan, _numbers(plan, found, common) * comparable, common)
    numbers = counted.new_tensor([len(found.indices), len(plan.pieces)])
    words = plan.group.all_reduce(torch.cat([counted, told.flatten(), numbers])).cpu()
    present, pieces = words[-2:].tolist()
    if pieces and not present:
        raise LayoutError(f"there is no gradient on any rank: {ABSENT}")
    counted, *rest = words[:-2].view(6, -1)
    whole = torch.tensor([float(plan.pieces[i].size or 0) for i in common], dtype=torch.float64)
    wrong = ((counted - whole).abs() > 0.5).nonzero().flatten().tolist()
    if wrong:
        listed = [f"{plan.label(common[k])} ({counted[k] / whole[k]:.3g}x)" for k in wrong]
        raise LayoutError(f"elements are not counted once: {_few(listed)}; {SAY_SO}")
    apart = _differ(torch.stack(rest), TOLERANCE).nonzero().flatten().tolist()
    if apart:
        raise _not_copies([plan.label(common[k]) for k in apart])


def _count_split(plan: Plan, found: Norms) -> None:
    """Gradients of the same shape and bits are one gradient: its shares on all ranks must add up to 1."""
    split = [k for k, i in enumerate(found.indices) if not plan.common[i]]
    sums = checksums([found.parts[k] for k in split], plan.device).long().tolist()
    keys = [
        _key(plan, found.indices[k], found.parts[k], found.norms[k], total)
        for k, total in zip(split, sums, strict=True)
    ]
    counted = _gathered(plan, keys, [1 / plan.replicas[found.indices[k]] for k in split])
    wrong = [
        f"{plan.label(found.indices[k])} ({counted[key]:.3g}x)"
        for k, key in zip(split, keys, strict=True)
        if found.norms[k] > 0 and abs(counted[key] - 1) > TOLERANCE
    ]
    _raise_if_counted(plan, wrong)


def compare_axes(plan: Plan, holders: Sequence[Tensor], measured: Measured) -> None:
    """Raise LayoutError, on every rank, where ranks along ``split_over`` hold one parameter, and count it twice.

    Norm layers of hand-made tensor parallelism do, and weights that are tied across stages. Parameters are the same
    whose values and gradients have the same shape and bits, on ranks that hold the same part of them. Values that are
    all one number, as zeros at the start, tell nothing: a later call does. The ``FEW_SMALL`` smallest and ``FEW_LARGE``
    largest of each rank are looked at. Three all-reduces, of a word twice and of two words a parameter and rank, and
    waits.
    """
    pieces, sources = plan.pieces, plan.sources
    here = [i for i in plan.by_axis if pieces[i].here and isinstance(holders[sources[i]], Tensor)]  # not DeepSpeed's
    here.sort(key=lambda i: pieces[i].here)
    chosen = frozenset([*here[:FEW_SMALL], *here[-FEW_LARGE:]])
    norms = plan.norms(measured, chosen)
    found = zip(norms.indices, norms.parts, norms.norms.tolist(), strict=True)
    shown = [(i, part, norm) for i, part, norm in found if i in chosen and norm > 0]
    values = [Held(pieces[i], holders[sources[i]]).values() for i, _, _ in shown]
    told = [not is_constant(each) for each in values]
    sums = checksums([part for _, part, _ in shown], plan.device) + HASHES * checksums(values, plan.device)
    keys = {
        i: _key(plan, i, part, norm, int(total))
        for (i, part, norm), total, tells in zip(shown, sums.tolist(), told, strict=True)
        if tells
    }
    counted = _gathered(plan, list(keys.values()), [1 / plan.replicas[i] for i in keys])
    wrong = [f"{plan.label(i)} ({counted[key]:.3g}x)" for i, key in keys.items() if counted[key] > 1 + TOLERANCE]
    _raise_if_counted(plan, wrong)


def _raise_if_counted(plan: Plan, wrong: Sequence[str]) -> None:
    """Raise on every rank what the first of them has found ``wrong``: one all-reduce, and another where some has."""
    first = torch.tensor([plan.group.rank if wrong else plan.group.size], device=plan.device)
    speaker = int(plan.group.all_reduce(first, dist.ReduceOp.MIN).item())
    if speaker < plan.group.size:
        listed = say(plan.group, plan.device, speaker, _few(wrong))
        raise LayoutError(
            f"gradients are not counted once: on rank {plan.group.ranks[speaker]} {listed}; return "
            "distclip.Layout(number of ranks that hold it) from layout= (a tied weight on two stages: Layout(2); norm "
            "layers that tensor-parallel ranks share: all of these)"
        )


def _gathered(plan: Plan, keys: Sequence[int], shares: Sequence[float]) -> Counter[int]:
    """The sum over the group of the share of each key, once a rank: two collectives of a number a key and rank.

    One rank may hold twins, such as biases that are added to the same stream, which no other has.
    """
    group, mine = plan.group, dict(zip(keys, shares, strict=True))
    most = int(group.all_reduce(torch.tensor([len(mine)], device=plan.device), dist.ReduceOp.MAX).item())
    rows = torch.zeros(group.size, 2, most, dtype=torch.float64, device=plan.device)
    rows[group.rank, :, : len(mine)] = torch.tensor([list(mine), list(mine.values())], dtype=torch.float64)
    if most:
        group.all_reduce(rows)
    counted: Counter[int] = Counter()
    for row_keys, row_shares in rows.tolist():
        for key, share in zip(row_keys, row_shares, strict=True):
            counted[int(key)] += share
    return counted


def _key(plan: Plan, index: int, gradient: Tensor, norm: Tensor | float, total: int) -> int:
    where = part_of(plan.group, plan.pieces[index])
    text = f"{where}|{tuple(gradient.shape)}|{gradient.dtype}|{float(norm).hex()}|{total}"
    return int.from_bytes(blake2b(text.encode(), digest_size=6).digest())


def _copied(plan: Plan) -> list[int]:
    """Pieces that other ranks have copies of, which can be compared."""
    return [i for i, p in enumerate(plan.pieces) if plan.common[i] and p.aligned and plan.replicas[i] > 1]


def _signs(plan: Plan, indices: Sequence[int]) -> Tensor:
    """1 - replicas on the rank that speaks for the copies of a piece, 1 on the others."""
    signs = [1 - plan.replicas[i] if speaks(plan.group, plan.pieces[i]) else 1 for i in indices]
    return sent(torch.tensor(signs, dtype=torch.float64), plan.device)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
