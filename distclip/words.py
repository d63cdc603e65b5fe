"""What travels: the few float64 words of the one all-reduce, and what their reduced values say.

For p < inf two words are summed: the sum of powers, which is not finite exactly when a rank's is, and an agreement
word. With ``code`` a 16-bit mix of what ranks must have in common and ``M = 2**36``, rank 0 sends
``code * (M - size + 1)`` and every other rank ``code``: the sum modulo M is 0 when all sent the same code. All terms
are whole numbers below 2**53, so the sum is exact in any order. A rank with an error of its own adds inf, which no
other can make up for. For p = inf four words are maximised: the largest norm (0 where it is not finite, because Gloo's
MAX drops NaN by position), a flag for inf or NaN, ``code`` and ``-code``. The verdict comes from reduced values alone,
so that every rank sees the same one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan

import torch
import torch.distributed as dist
from torch import Tensor

from .group import ClippingGroup

MODULUS = 2.0**36
CODES = 1 << 16


@dataclass(frozen=True, slots=True)
class Reduced:
    """What the reduced words say, the same on every rank.

    * ``norm``: 0-d float64, the total norm.
    * ``disagree``: 0-d bool, ranks sent different codes or reported a fault.
    * ``answers``: for each question, a 0-d bool: whether some rank said yes.
    """

    norm: Tensor
    disagree: Tensor
    answers: tuple[Tensor, ...]


def reduce_norm(
    group: ClippingGroup, local: Tensor, p: float, code: int, faulty: bool, questions: Sequence[bool]
) -> Reduced:
    """Make ``local``, this rank's sum of powers over replicas (p = inf: its largest norm), global.

    One all-reduce of two float64 words (p = inf: four) and one for each of ``questions``, made by every rank of the
    group whatever it holds; none in one process. A ``faulty`` rank, which is about to raise, takes part so that the
    others do not wait for it.
    """
    reduce = _reduce_max if p == inf else _reduce_sum
    said = [torch.full_like(local, yes) for yes in questions]
    norm, disagree, *answers = reduce(group, local, p, code % CODES, inf if faulty else 0.0, said)
    return Reduced(norm, disagree, tuple(answer > 0 for answer in answers))


def _reduce_sum(
    group: ClippingGroup, local: Tensor, p: float, code: int, fault: float, said: list[Tensor]
) -> tuple[Tensor, ...]:
    word = code * (MODULUS - group.size + 1) if group.rank == 0 else float(code)
    words = torch.stack([local, torch.full_like(local, word + fault), *said])
    total, agreement, *answers = group.all_reduce(words).unbind()
    return total.sqrt() if p == 2 else total.pow(1 / p), agreement.remainder(MODULUS) != 0, *answers


def _reduce_max(
    group: ClippingGroup, local: Tensor, p: float, code: int, fault: float, said: list[Tensor]
) -> tuple[Tensor, ...]:
    flag = torch.where(local.isnan(), 2.0, torch.where(local.isinf(), 1.0, 0.0)).to(local)
    finite = torch.where(flag == 0, local, 0.0)
    codes = torch.full_like(local, code + fault), torch.full_like(local, -code)
    words = torch.stack([finite, flag, *codes, *said])
    norm, flag, high, low, *answers = group.all_reduce(words, dist.ReduceOp.MAX).unbind()
    return torch.where(flag == 2, nan, torch.where(flag == 1, inf, norm)), high != -low, *answers


def clip_coef(norm: Tensor, max_norm: Tensor) -> Tensor:
    """``min(1, max_norm / (norm + 1e-6))`` as torch has it, from float64 to 0-d float32; 1 when max_norm is inf."""
    coef = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(max_norm == inf, 1.0, coef).float()


def presented(norm: Tensor, dtype: torch.dtype) -> Tensor:
    """``norm`` in ``dtype`` (float32 or float64); finite stays finite: beyond float32 it is ``finfo.max``."""
    if dtype == torch.float64:
        return norm
    return torch.where(norm.isfinite(), norm.clamp(max=torch.finfo(dtype).max), norm).to(dtype)
