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
from dataclasses import dataclass, replace
from math import frexp, inf, isfinite, isinf, isnan, ldexp, nan, sqrt
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .group import ClippingGroup

MODULUS = 2.0**36
CODES = 1 << 16
LEAST = torch.finfo(torch.float32).smallest_normal  # 2**-126; smaller ones lose precision, or are taken for 0

Word: TypeAlias = Tensor | float
"""A number where the words are reduced on the host, a 0-d float64 tensor where that is an accelerator."""


@dataclass(frozen=True, slots=True)
class Reduced:
    """What the reduced words say, the same on every rank: numbers on the host, 0-d tensors on an accelerator.

    * ``norm``: the total norm, float64.
    * ``disagree``: whether ranks sent different codes or reported a fault.
    * ``answers``: for each question, whether some rank said yes.
    * ``own``: what this rank alone has put in, where every rank holds a copy of every gradient; else None.
    * ``who``: after what an error says of the disagreement, which ranks it is; empty where that was not asked.
    """

    norm: Word
    disagree: Tensor | bool
    answers: tuple[Tensor | bool, ...]
    own: Word | None = None
    who: str = ""

    def unscaled(self, scale: float, p: float) -> "Reduced":
        """The same of gradients that are ``scale`` times smaller."""
        power = scale if p == inf else scale**p
        return replace(self, norm=self.norm / scale, own=None if self.own is None else self.own / power)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Norm and disagreement as 0-d tensors on ``device``, where they are."""
        return torch.as_tensor(self.norm, dtype=torch.float64, device=device), torch.as_tensor(self.disagree)

    def read(self) -> tuple[float, bool, list[bool]]:
        """Norm, disagreement and answers as numbers: one wait if they are on an accelerator."""
        if not isinstance(self.norm, Tensor):
            return self.norm, bool(self.disagree), list(map(bool, self.answers))
        words = torch.stack([torch.as_tensor(word).double() for word in (self.norm, self.disagree, *self.answers)])
        norm, disagree, *answers = words.tolist()
        return norm, bool(disagree), list(map(bool, answers))


def reduce_norm(
    group: ClippingGroup,
    local: Word,
    p: float,
    code: int,
    faulty: bool,
    questions: Sequence[bool],
    copied: bool = False,
    call: str = "",
) -> Reduced:
    """Make ``local``, this rank's sum of powers over replicas (p = inf: its largest norm), global.

    One all-reduce of two float64 words (p = inf: four) and one for each of ``questions``, made by every rank of the
    group whatever it holds; none in one process. A ``faulty`` rank, which is about to raise, takes part so that the
    others do not wait for it. ``copied``: every rank of the group holds a copy of all that is summed.
    ``call``: what it is for, as errors say.
    """
    reduce = _reduce_max if p == inf else _reduce_sum
    fault, said = inf if faulty else 0.0, list(map(float, questions))
    norm, disagree, *answers = reduce(group, local, p, code % CODES, fault, said, call)
    own = local if copied else None
    return Reduced(norm, disagree, tuple(answer > 0 for answer in answers), own)


def _reduce_sum(
    group: ClippingGroup,
    local: Word,
    p: float,
    code: int,
    fault: float,
    said: list[float],
    call: str,
) -> tuple[Any, ...]:
    word = code * (MODULUS - group.size + 1) if group.rank == 0 else float(code)
    total, agreement, *answers = _all_reduce(group, [local], [word + fault, *said], dist.ReduceOp.SUM, call)
    return root(total, p), agreement % MODULUS != 0, *answers


def _reduce_max(
    group: ClippingGroup,
    local: Word,
    p: float,
    code: int,
    fault: float,
    said: list[float],
    call: str,
) -> tuple[Any, ...]:
    known = [code + fault, -float(code), *said]
    if not isinstance(local, Tensor):
        flag = 2.0 if isnan(local) else 1.0 if isinf(local) else 0.0
        own = [0.0 if flag else local, flag]
        norm, flag, high, low, *answers = _all_reduce(group, own, known, dist.ReduceOp.MAX, call)
        return nan if flag == 2 else inf if flag == 1 else norm, high != -low, *answers
    flags = torch.where(local.isnan(), 2.0, torch.where(local.isinf(), 1.0, 0.0)).to(local)
    finite = torch.where(flags == 0, local, 0.0)
    norm, flags, high, low, *answers = _all_reduce(group, [finite, flags], known, dist.ReduceOp.MAX, call)
    return torch.where(flags == 2, nan, torch.where(flags == 1, inf, norm)), high != -low, *answers


def _all_reduce(
    group: ClippingGroup, own: Sequence[Word], known: Sequence[float], op: dist.ReduceOp.RedOpType, call: str
) -> list[Any]:
    """The reduced words, ``own`` ones first: numbers if these are, 0-d tensors on their device otherwise."""
    first, number = own[0], len(own) + len(known)
    if op != dist.ReduceOp.SUM:
        number = -number  # as many words to be added up may say the opposite: the two must not meet
    if isinstance(first, Tensor):
        words = torch.stack([*own, *(torch.full_like(first, word) for word in known)])  # type: ignore[list-item]
        return list(group.all_reduce(words, op, number, call).unbind())
    if group.process_group is None:
        return [*own, *known]
    words = torch.tensor([*own, *known], dtype=torch.float64)
    reduced: list[Any] = group.all_reduce(words, op, number, call).tolist()
    return reduced


def root(total: Word, p: float) -> Word:
    """The norm of which ``total`` is the sum of powers, p < inf."""
    if p == 2:
        return total.sqrt() if isinstance(total, Tensor) else sqrt(total)
    if isinstance(total, Tensor):
        return total.pow(1 / p)
    return torch.tensor(total, dtype=torch.float64).pow(1 / p).item()  # Python's own raises where it overflows


def clip_coef(norm: Word, max_norm: Word, dtype: torch.dtype = torch.float32) -> Tensor:
    """``min(1, max_norm / (norm + 1e-6))`` as torch has it, 0-d; 1 when max_norm is inf.

    From float64 to float32, or to float64 where gradients are, whose norms leave the range of float32.
    """
    if isinstance(max_norm, Tensor):
        coef = (max_norm.double() / (norm + 1e-6)).clamp(max=1.0)
        return torch.where(max_norm == inf, 1.0, coef).to(dtype)
    if isinstance(norm, Tensor):
        if max_norm == inf:
            return torch.ones((), dtype=dtype, device=norm.device)
        bound = torch.scalar_tensor(max_norm, dtype=torch.float64)  # of the host: an argument of the kernel, no copy
        return (bound / (norm + 1e-6)).clamp_(max=1.0).to(dtype)
    factor = max_norm / (norm + 1e-6)
    return torch.scalar_tensor(1.0 if factor > 1.0 or max_norm == inf else factor, dtype=dtype)


def factors(norm: float, max_norm: float, coef: float | None, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The coefficient as a report shows it, 0-d, and what gradients are multiplied by, one after the other.

    That is ``coef``, or :func:`clip_coef` for None: nothing where it is 1, the coefficient itself where it is normal in
    float32. A smaller one would lose precision, or zero what is finite: it becomes several numbers that are normal, and
    what is shown is never 0.
    """
    shown = clip_coef(norm, max_norm, dtype) if coef is None else torch.scalar_tensor(coef, dtype=dtype)
    number = shown.item()
    if number == 1.0:
        return shown, ()
    if not number < LEAST or not isfinite(norm):
        return shown, (shown,)
    over, under = (max_norm, norm + 1e-6) if coef is None else (coef, 1.0)
    parts = tuple(torch.scalar_tensor(part, dtype=dtype) for part in _normal_parts(over, under))
    return torch.full_like(shown, torch.finfo(dtype).smallest_normal) if number == 0.0 else shown, parts


def _normal_parts(over: float, under: float) -> list[float]:
    """Numbers from ``LEAST`` to 1 whose product is ``over / under``; powers of two, which round nothing, come first."""
    (high, exponent), (low, taken) = frexp(over), frexp(under)
    rest, exponent = high / low / 2, exponent - taken + 1  # the rest is between 1/4 and 1
    parts = []
    while exponent < -124:
        parts.append(LEAST)
        exponent += 126
    return [*parts, ldexp(rest, exponent)]


def least_normal(coef: Tensor, norm: Tensor | None = None) -> Tensor:
    """``coef`` where the host does not know it, and so not whether several factors are needed: at least ``LEAST``.

    ``norm``: where that may be inf, and 0 is right as torch has it.
    """
    least = coef.clamp(min=LEAST)
    return least if norm is None else torch.where(norm == inf, coef, least)


def presented(norm: Word, dtype: torch.dtype) -> Tensor:
    """``norm`` in ``dtype`` (float32 or float64); finite stays finite: beyond float32 it is ``finfo.max``."""
    most = torch.finfo(dtype).max
    if isinstance(norm, Tensor):
        return norm if dtype == torch.float64 else torch.where(norm.isfinite(), norm.clamp(max=most), norm).to(dtype)
    return torch.scalar_tensor(most if most < norm < inf else norm, dtype=dtype)
