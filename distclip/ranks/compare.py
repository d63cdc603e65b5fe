"""Comparing ranks: a few numbers at construction, checksums of parameters, and a text from one rank to all."""

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import of_whole
from ..kernels.device import has_float64
from ..kernels.dtypes import as_real
from ..kernels.transfer import sent
from . import refusals
from .connections import all_reduce
from .group import ClippingGroup

SAMPLE = 4096  # elements of a parameter that its checksum looks at
HASHES = 1 << 20  # a checksum is below: times 2**32 ranks, still exact in float64
TEXT_BYTES = 1024


def differing_fields(group: ClippingGroup, device: torch.device, fields: Mapping[str, float]) -> list[str]:
    """The names of the fields whose numbers are not the same on every rank of the group, the same list on all.

    One all-reduce, of two float64 numbers a field, and one host sync. Numbers must be finite.
    """
    values = torch.tensor(list(fields.values()), dtype=torch.float64, device=device)
    message = torch.cat([values, -values])  # the largest and, negated, the smallest in one collective
    high, low = all_reduce(group, message, dist.ReduceOp.MAX, call="Clipper()").chunk(2)
    return [name for name, differs in zip(fields, (high != -low).tolist(), strict=True) if differs]


def who_differs(group: ClippingGroup, device: torch.device, mine: str, code: int = 0) -> str:
    """Name the ranks whose text ``mine`` is not the most common one; quote the first of them and a rank that has that.

    The same on every rank; empty where all texts are equal, and the ``code`` behind each of them. Three all-reduces, of
    a float64 number a rank and twice of 1024 bytes, with a host sync each.
    """
    rows = torch.zeros(group.size, dtype=torch.float64, device=device)
    rows[group.rank] = crc32(mine.encode(), code)
    hashes = all_reduce(group, rows).tolist()
    counts = Counter(hashes)
    usual = hashes.index(counts.most_common(1)[0][0])
    odd = [rank for rank, value in enumerate(hashes) if value != hashes[usual]]
    if not odd:
        return ""
    text, usual_text = [broadcast_text(group, device, rank, mine) for rank in (odd[0], usual)]
    return refusals.differs([group.ranks[rank] for rank in odd], text, group.ranks[usual], usual_text)


def distinct_texts(group: ClippingGroup, device: torch.device, mine: str) -> list[str]:
    """The different texts of all ranks, in the order of the first ranks that have them; the same list on every rank.

    Two all-reduces, of two float64 numbers a rank and of the bytes of all these texts, with a host sync each.
    """
    raw = mine.encode()
    rows = torch.zeros(group.size, 2, dtype=torch.float64)
    digest = int.from_bytes(blake2b(raw, digest_size=6).digest())  # 48 bits: exact in float64
    rows[group.rank] = torch.tensor([digest, len(raw)], dtype=torch.float64)
    told = all_reduce(group, sent(rows, device)).tolist()
    first: dict[tuple[int, int], int] = {}
    for rank, (code, length) in enumerate(told):
        first.setdefault((int(code), int(length)), rank)
    lengths = [length for _, length in first]
    letters = torch.zeros(sum(lengths), dtype=torch.uint8)
    for part, rank in zip(torch.split(letters, lengths), first.values(), strict=True):
        if rank == group.rank and raw:
            part.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    if len(letters):
        letters = all_reduce(group, sent(letters, device)).cpu()  # the others add zeros
    return [bytes(part.tolist()).decode() for part in torch.split(letters, lengths)]


def checksums(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whole numbers below ``HASHES``, float64, one for each tensor: equal where values are, for plain local tensors.

    From the float64 sum and sum of squares of at most ``SAMPLE`` evenly spread elements; 0 for meta tensors.
    """
    sums = torch.zeros(len(tensors), 2, dtype=torch.float64, device=device)
    for row, tensor in zip(sums, tensors, strict=True):
        if tensor.numel() and tensor.device.type != "meta":
            values = _sample(tensor)
            values = (values if has_float64(values.device) else values.cpu()).double()
            row.copy_(torch.stack([values.sum(), values.square().sum()]))
    totals, squares = sums.view(torch.int64).unbind(1)
    return (_mixed(_mixed(totals) + squares) % HASHES).double()


def projections(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The projection of each tensor, 0-d float64: at most ``SAMPLE`` elements on a direction set by their number.

    On ``device``: one copy from each other device, which is a host sync if ``device`` is the CPU.
    """
    by_device: dict[torch.device, list[int]] = {}
    for k, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(k)
    found: dict[int, Tensor] = {}
    for home, places in by_device.items():
        at = home if has_float64(home) else device
        row = torch.stack([_along(_sample(tensors[k]).to(at).double()) for k in places])
        found |= zip(places, sent(row, device).unbind(), strict=True)
    return [found[k] for k in range(len(tensors))]


def _along(values: Tensor) -> Tensor:
    direction = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device).cos_()
    return values.dot(direction / direction.norm().clamp_(min=1e-3))


def is_constant(tensor: Tensor) -> bool:
    """Whether all of its elements are one number, by at most ``SAMPLE`` of them. A host sync on an accelerator."""
    values = _sample(tensor)
    return not values.numel() or bool((values == values[0]).all())


def bit_sums(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Like :func:`checksums`, from every bit of every element and its place, so that all are read."""
    sums = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    by_device: dict[torch.device, list[int]] = {}
    for k, tensor in enumerate(tensors):
        if tensor.device.type != "meta":
            by_device.setdefault(tensor.device, []).append(k)
    for places in by_device.values():
        found = of_whole([_in_words(tensors[k].detach()) for k in places])
        sums[sent(torch.tensor(places), device)] = sent(found, device)
    return (sums % HASHES).double()


def _in_words(tensor: Tensor) -> Tensor:
    """What fingerprints can be made of: numbers of 8 bits as ones of 16."""
    return tensor.view(torch.uint8).to(torch.int16) if tensor.itemsize == 1 else tensor


def _mixed(bits: Tensor) -> Tensor:
    """int64 in which every bit depends on every bit of ``bits``, so that 1.0 and 2.0, 2 bits apart, are far apart.

    The end of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), by signed numbers that wrap.
    """
    bits = (bits ^ bits >> 30) * -0x40A7B892E31B1A47
    bits = (bits ^ bits >> 27) * -0x6B2FB644ECCEEE15
    return bits ^ bits >> 31


def _sample(tensor: Tensor) -> Tensor:
    flat = as_real(tensor.detach()).reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE]


def broadcast_text(group: ClippingGroup, device: torch.device, source: int, text: str) -> str:
    """The ``text`` of the group's rank ``source``, on every rank: one all-reduce of 1024 bytes and one host sync."""
    letters = torch.zeros(TEXT_BYTES, dtype=torch.uint8)
    if group.rank == source:
        raw = text.encode()[:TEXT_BYTES]
        letters[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    reduced = all_reduce(group, letters.to(device))  # the others add zeros
    return bytes(reduced.tolist()).rstrip(b"\0").decode(errors="replace")
