"""Bits: elements of tensors as integers and squares of their halves, added modulo 2 ** 32, in any order and split.

Elements of 16 bits count with their sign, those of more than 32 are as many integers of 32, and the dtype is no part
of it. The squares are of signed halves of 16 bits, of a whole element where it has no more: integers alone would not
tell a copy that is negated, or twice or 65536 times as large, which adds the same to each element, often 0 in all.
One flipped bit anywhere changes the sum; what else does not change it is by chance, at most about once in 2 ** 16, or
has the same elements in another order. On the CPU native/sums.c adds in the pass that squares.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .dtypes import as_real
from .flat import flat_views

Bits: TypeAlias = "array[int]"
"""One unsigned number of 32 bits, which sums are added to."""

MODULUS = 1 << 32
CHUNK = 1 << 20  # integers of which torch squares the halves at once: 8 MiB
ON_DEVICE = 1 << 22  # the same on accelerators
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int32}  # by bytes of an element


def no_bits() -> Bits:
    """The sum of nothing."""
    return array("I", [0])


def add_integers(bits: Bits, tensors: Sequence[Tensor]) -> None:
    """Add all elements of ``tensors``, on the CPU, by torch's kernels."""
    for tensor in tensors:
        bits[0] = (bits[0] + int(_sum(tensor))) % MODULUS


def bits_of_each(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of each tensor, below 2 ** 32: (len(tensors),) int64, on their common device; no host sync."""
    if not tensors:
        return torch.zeros(0, dtype=torch.int64)
    return torch.stack([_sum(tensor) for tensor in tensors]) % MODULUS


def _sum(tensor: Tensor) -> Tensor:
    found = [part.sum() + part.view(torch.int16).int().square().sum() for part in _integers(tensor)]
    if not found:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    return found[0] if len(found) == 1 else torch.stack(found).sum()


def _integers(tensor: Tensor) -> Iterator[Tensor]:
    """Its elements as 1-D parts of integers."""
    if tensor.numel():
        for flat in flat_views(as_real(tensor)):
            yield from torch.split(flat.view(INTEGERS[flat.itemsize]), CHUNK if tensor.is_cpu else ON_DEVICE)
