"""Whether all ranks sent the same code, and whether all copies hold the same bits: by one word, summed over ranks.

[Note: words that vanish]
One rank sends its number times ``1 - n``, n - 1 others theirs: the sum is that of all differences from the one, 0 where
all n are equal, and never 0 where they are two different numbers. Numbers are mixed before, or 1, 2 and 3 would cancel.

* **agreement word**: of all ranks, of their code. The words add up to 0 if codes agree, else to another whole number.
* **drift word**: of each set of ranks that hold copies, of the bits of these (kernels/bits.py), where the first of its
  ranks sends the product. The words of all sets are added to one, modulo the prime ``COPIES``: it is 0 if all copies
  are equal, and never 0 where one of them is another. Several others cancel by chance, about once in 2**32.

A message on the host has both in one number, since Gloo takes twice as long for three numbers as for two: the sum of
agreement words is 0, that of both a multiple of ``COPIES``, no larger than ranks times that. Where it is anything else
ranks ask which of the two it was (plan/measure.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CODES = 1 << 32
COPIES = CODES + 15  # a prime above all numbers that are mixed; that of 2**20 ranks fits into float64


@dataclass(frozen=True, slots=True)
class Drift:
    """What a rank sends of its copies.

    * ``word``: a whole number where messages are reduced on the host, else a 0-d float64 tensor. For p = inf, where
      there are no sums, it is the mixed bits of what every rank holds.
    * ``amounts``: numbers that are summed beside it, p < inf.
    * ``stops``: whether a norm on an accelerator is NaN where copies have drifted apart, as where ranks disagree.
    """

    word: float | Tensor = 0.0
    amounts: Sequence[float | Tensor] = ()
    stops: bool = False


def mixed(number: int) -> int:
    """Another number below ``CODES``; different numbers stay different, and 0 stays 0."""
    # lowbias32 of Chris Wellons' hash-prospector, which is bijective.
    number ^= number >> 16
    number = number * 0x7FEB352D % CODES
    number ^= number >> 15
    number = number * 0x846CA68B % CODES
    return number ^ number >> 16


def mixed_on_device(numbers: Tensor) -> Tensor:
    """The same of int64 numbers below ``CODES``, without a host sync."""
    numbers = numbers ^ numbers >> 16
    numbers = numbers * 0x7FEB352D % CODES
    numbers = numbers ^ numbers >> 15
    numbers = numbers * 0x846CA68B % CODES  # wraps modulo 2**64, which CODES divides
    return numbers ^ numbers >> 16


def agreement_word(code: int, rank: int, size: int) -> float:
    """What rank ``rank`` of ``size`` sends for ``code``, below ``CODES``: the words of all add up to 0 if codes agree.

    A whole number below 2**52 for up to 2**20 ranks, so that float64 adds them exactly in any order.
    """
    # Codes are linear in the step: without a mix a rank ahead and one as far behind would cancel.
    code = mixed(code)
    return float(code * (1 - size) if rank == 0 else code)


def drift_word(bits: Mapping[int, int], signs: Sequence[int]) -> float:
    """Of the bits of each set of copies, by its number; ``signs``: 1 - copies on the first rank of each set, else 1."""
    return float(sum(mixed(number) * signs[k] for k, number in bits.items()) % COPIES)


def drift_word_on_device(bits: Tensor, signs: Sequence[int]) -> Tensor:
    """The same for bits, (sets,) int64 on an accelerator, of some sets and their signs: 0-d float64; no host sync."""
    words = [number * sign for number, sign in zip(mixed_on_device(bits).unbind(), signs, strict=True)]
    return (torch.stack(words).sum() % COPIES).double()


def is_settled(word: float, size: int) -> bool:
    """Whether a reduced word that has both in it, of ``size`` ranks, says that nothing is wrong."""
    return 0 <= word <= size * COPIES and word % COPIES == 0
