"""Fingerprints: one number of 64 bits from every bit of every element and its place in the whole parameter.

A fingerprint is the sum, modulo 2 ** 64, of a mix of each element, and so has no order: those of the parts of a
parameter add up to that of the whole, in whatever layout they lie; so do those of parameters, whose seeds tell them
apart. As int64 they add in any all-reduce, which wraps as they do.

The bits are those of the dtype that is stored, and the dtype itself is no part of it: 0 in fp32 and in bf16 are the
same, -0.0 is another than 0.0, and each NaN another than those with other bits. An element of more than 32 bits is as
many words of 32, its place that many times as far; of a complex number the real part comes first.

Mixed is the word, exclusive or ``seed`` + its place times an odd constant: z += lower half times upper half, the upper
half onto the lower one, and the first step again. Every word that differs changes the number with a chance of
1 - 2 ** -64; of 2 ** 23 equal flips of one bit no two changed it by the same amount.
"""

from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .dtypes import as_real
from .flat import COPY
from .memory import check_memory
from .sums import PLAIN
from .transfer import sent

APART = 0x9E3779B97F4A7C15 - (1 << 64)  # as in fingerprint.c, as int64
LOWER = (1 << 32) - 1
CHUNK = 1 << 16  # words mixed at once: 512 KiB
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int32}


class Place(NamedTuple):
    """Where the elements of a tensor, in their order in memory, are in the whole parameter, counted row by row.

    They are in runs of ``length``, which begin at ``starts``, int64 on the CPU, and whose neighbours are ``step``
    apart; the tensor begins with element ``skip`` of the first run.
    """

    starts: Tensor
    length: int
    step: int = 1
    skip: int = 0


def whole(numel: int) -> Place:
    """Of a whole parameter, row-major."""
    return Place(torch.zeros(1, dtype=torch.int64, device="cpu"), numel)


def seed_of(name: str) -> int:
    """A seed for the parameter of this name."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def order_of(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions of a tensor as they count in memory, that of neighbours last: the order of its elements here."""
    return tuple(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))


def fingerprints(tensors: Sequence[Tensor], places: Sequence[Place], seeds: Sequence[int]) -> Tensor:
    """The fingerprint of each tensor, as int64, on their common device, or the CPU; 0 of an empty one.

    ``places``: of the elements in the order of memory, see `order_of`. ``seeds``: below 2 ** 64, one for each
    parameter. RuntimeError where memory was freed. No temporary is as large as a large tensor. No host sync.
    """
    device = tensors[0].device if tensors else torch.device("cpu")
    numbers = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    check_memory(tensors)
    rest: Sequence[int] = range(len(tensors))
    if native.fingerprints is not None and device.type == "cpu":
        flat = [_in_order(t) for t in tensors]
        read = [k for k in rest if type(flat[k]) in PLAIN and flat[k].is_contiguous()]
        sizes = {flat[k].itemsize for k in read}
        for size in sizes:
            _mix_compiled(size, [k for k in read if flat[k].itemsize == size], flat, places, seeds, numbers)
        rest = sorted(set(rest).difference(read))
    for k in (k for k in rest if tensors[k].numel()):
        numbers[k] = _mixed(_in_order(tensors[k]), places[k], seeds[k])
    return numbers


def of_whole(tensors: Sequence[Tensor]) -> Tensor:
    """The fingerprint of each tensor, row by row however it lies in memory, with the seed 0; else as `fingerprints`."""
    device = tensors[0].device if tensors else torch.device("cpu")
    numbers = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    which, parts, places = list[int](), list[Tensor](), list[Place]()
    for k, tensor in enumerate(tensors):
        at = 0
        for part in _parts(tensor):
            which.append(k)
            parts.append(part)
            places.append(whole(tensor.numel())._replace(skip=at))
            at += part.numel()
    found, index = fingerprints(parts, places, [0] * len(parts)), torch.tensor(which, dtype=torch.int64)
    return numbers.index_add_(0, sent(index, device), found)


def _in_order(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.permute(order_of(tensor))


def _mix_compiled(
    size: int,
    which: Sequence[int],
    tensors: Sequence[Tensor],
    places: Sequence[Place],
    seeds: Sequence[int],
    numbers: Tensor,
) -> None:
    table = [[tensors[k].data_ptr() for k in which], [tensors[k].numel() for k in which]]
    table.append([n for k in which for n in (places[k].starts.data_ptr(), *places[k][1:], seeds[k])])
    lists = [array("Q", each) for each in table]
    found = torch.zeros(len(which), dtype=torch.int64, device="cpu")
    where = (each.buffer_info()[0] for each in lists)
    assert native.fingerprints is not None
    native.fingerprints(*where, len(which), size, native.widest, torch.get_num_threads(), found.data_ptr())
    numbers[list(which)] = found


def _mixed(tensor: Tensor, place: Place, seed: int) -> Tensor:
    """The fingerprint of one tensor by torch's kernels."""
    total = tensor.new_zeros((), dtype=torch.int64)
    at = place.skip
    starts = place.starts.to(tensor.device)
    for flat in _parts(tensor):
        words = as_real(flat).view(-1)
        words = words.view(INTEGERS[words.itemsize]).view(-1, max(1, flat.itemsize // 4))
        for part in torch.split(words, CHUNK // words.shape[1]):
            total += _mix(part, at, starts, place, seed).sum()
            at += len(part)
    return total


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Its elements in row-major order: a view, or one copy of at most ``COPY`` elements after the other."""
    if tensor.is_contiguous():
        yield tensor.view(-1)
    elif tensor.numel() <= COPY:
        yield tensor.contiguous().view(-1)
    else:
        first = next(dim for dim, size in enumerate(tensor.shape) if size > 1)
        for half in tensor.tensor_split(2, first):
            yield from _parts(half)


def _mix(words: Tensor, at: int, starts: Tensor, place: Place, seed: int) -> Tensor:
    """Of elements from number ``at`` of the runs on: (elements, words of each) integers."""
    count, each = words.shape
    along = torch.arange(at, at + count, device=words.device)
    index = starts[along // place.length] + along % place.length * place.step
    index = index.view(-1, 1) * each + torch.arange(each, device=words.device)
    seed = seed - (seed >> 63 << 64)
    z = words.long() & (LOWER if words.itemsize == 4 else 0xFFFF)
    z ^= index * APART + seed
    z += (z & LOWER) * (z >> 32 & LOWER)
    z ^= z >> 32 & LOWER
    return z.add_((z & LOWER) * (z >> 32 & LOWER))
