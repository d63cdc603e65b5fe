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
from math import inf, isinf, isnan, nan, sqrt
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .group import ClippingGroup

MODULUS = 2.0**36
CODES = 1 << 16

Word: TypeAlias = Tensor | float
"""A number where the words are reduced on the host, a 0-d float64 tensor where that is an accelerator."""


@dataclass(frozen=True, slots=True)
class Reduced:
    """What the reduced words say, the same on every rank: numbers on the host, 0-d tensors on an accelerator.

    * ``norm``: the total norm, float64; a tensor is NaN where ranks disagree.
    * ``disagree``: whether ranks sent different codes or reported a fault.
    * ``answers``: for each question, whether some rank said yes: a number above 0.
    * ``own``: what this rank alone has put in, where every rank holds a copy of every gradient; else None.
    * ``who``: after what an error says of the disagreement, which ranks it is; empty where that was not asked.
    * ``row``: own word, norm and disagreement as they lie side by side in memory, float64, where they do.
    """

    norm: Word
    disagree: Tensor | bool
    answers: tuple[Word, ...]
    own: Word | None = None
    who: str = ""
    row: Tensor | None = None

    def unscaled(self, scale: float, p: float) -> "Reduced":
        """The same of gradients that are ``scale`` times smaller."""
        power = scale if p == inf else scale**p
        return replace(self, norm=self.norm / scale, own=None if self.own is None else self.own / power, row=None)

    def tensor(self, device: torch.device) -> Tensor:
        """The norm as a 0-d tensor on ``device``, where it is; NaN where ranks disagree."""
        if isinstance(self.norm, Tensor):
            return self.norm
        return torch.scalar_tensor(nan if self.disagree else self.norm, dtype=torch.float64, device=device)

    def to_send(self, device: torch.device) -> Tensor:
        """What the host wants to know of these words on ``device``, 1-D float64, for :meth:`sent`."""
        if self.row is not None:
            return self.row
        norm = self.tensor(device)
        if self._is_of_one():
            return norm.view(1)
        return torch.stack(
            [_beside(norm, word) for word in (norm if self.own is None else self.own, norm, self.disagree)]
        )

    def sent(self, numbers: Sequence[float]) -> tuple[float, float, float, Sequence[float]]:
        """Own word, norm, disagreement and what was sent after them."""
        if self._is_of_one():
            return numbers[0], numbers[0], 0.0, numbers[1:]
        own, norm, disagree, *more = numbers
        return own, norm, disagree, more

    def _is_of_one(self) -> bool:
        """Whether there is nothing but the norm: nobody to disagree with, and no copies."""
        return self.disagree is False and self.own is None

    def read(self) -> tuple[float, bool, list[bool]]:
        """Norm, disagreement and answers as numbers: one wait if they are on an accelerator."""
        if not isinstance(self.norm, Tensor):
            return self.norm, bool(self.disagree), [float(answer) > 0 for answer in self.answers]
        words = torch.stack([_beside(self.norm, word) for word in (self.norm, self.disagree, *self.answers)])
        norm, disagree, *answers = words.tolist()
        return norm, bool(disagree), [answer > 0 for answer in answers]


def _beside(norm: Tensor, word: Word) -> Tensor:
    """``word`` in float64 where ``norm`` is."""
    return word.double() if isinstance(word, Tensor) else torch.full_like(norm, word)


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
    if isinstance(local, Tensor) and group.process_group is None:  # nobody to disagree with, and no words to be made
        return Reduced(local if p == inf else root(local, p), False, tuple(questions))
    reduce = _reduce_max if p == inf else _reduce_sum
    fault, said = inf if faulty else 0.0, list(map(float, questions))
    row, norm, disagree, *answers = reduce(group, local, p, code % CODES, fault, said, call)
    own = local if copied else None
    if isinstance(norm, Tensor):
        norm.masked_fill_(disagree, nan)
    return Reduced(norm, disagree, tuple(answers), own, row=row)


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
    row, (total, agreement, *answers) = _all_reduce(group, [local], [word + fault, *said], dist.ReduceOp.SUM, call)
    if row is None:
        return None, root(total, p), agreement % MODULUS != 0, *answers
    norm = total.sqrt_() if p == 2 else total.pow_(1 / p)  # where they lie, for the host to have them as they do
    return row, norm, agreement.remainder_(MODULUS) != 0, *answers


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
        _, (norm, flag, high, low, *answers) = _all_reduce(group, own, known, dist.ReduceOp.MAX, call)
        return None, nan if flag == 2 else inf if flag == 1 else norm, high != -low, *answers
    flags = torch.where(local.isnan(), 2.0, torch.where(local.isinf(), 1.0, 0.0)).to(local)
    finite = torch.where(flags == 0, local, 0.0)
    _, (norm, flags, high, low, *answers) = _all_reduce(group, [finite, flags], known, dist.ReduceOp.MAX, call)
    return None, torch.where(flags == 2, nan, torch.where(flags == 1, inf, norm)), high != -low, *answers


def _all_reduce(
    group: ClippingGroup, own: Sequence[Word], known: Sequence[float], op: dist.ReduceOp.RedOpType, call: str
) -> tuple[Tensor | None, Sequence[Any]]:
    """The reduced words, ``own`` ones first: numbers if these are, 0-d tensors on their device otherwise.

    There they lie side by side, the first of ``own`` as it was before them: a row of that and two reduced words.
    """
    first, number = own[0], len(own) + len(known)
    if op != dist.ReduceOp.SUM:
        number = -number  # as many words to be added up may say the opposite: the two must not meet
    if isinstance(first, Tensor):
        made = {word: torch.full_like(first, word) for word in known}
        words = torch.stack([first, *own, *(made[word] for word in known)])  # type: ignore[list-item]
        group.all_reduce(words[1:], op, number, call)
        return words[:3], words[1:].unbind()
    if group.process_group is None:
        return None, [*own, *known]
    words = torch.tensor([*own, *known], dtype=torch.float64)
    return None, group.all_reduce(words, op, number, call).tolist()


def root(total: Word, p: float) -> Word:
    """The norm of which ``total`` is the sum of powers, p < inf."""
    if p == 2:
        return total.sqrt() if isinstance(total, Tensor) else sqrt(total)
    if isinstance(total, Tensor):
        return total.pow(1 / p)
    return torch.tensor(total, dtype=torch.float64).pow(1 / p).item()  # Python's own raises where it overflows
