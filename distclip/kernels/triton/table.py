"""Where tensors lie in device memory: what the kernels read instead of one argument per tensor."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flat import is_dense

LINE = 128  # bytes of a cache line
BLOCK_BYTES = 1 << 15  # the work of one program: 8 loads of 16 bytes for each of 256 threads, enough to hide latency
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KEPT = 16  # tables: dtypes times lists of tensors that one process clips; 600 of 1e9 elements: 0.5 MB

Key = tuple[torch.dtype, torch.device, tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Addresses of dense tensors of one dtype, on their device. Keeps no tensor of the caller alive.

    * ``rows``: int64, (tensors, 5): address rounded down to a cache line, first and end element counted from there,
      number of the first block, place of the tensor in the caller's list.
    * ``row_of_block``: int32, (blocks,).
    * ``stream``: the stream that copied it; another would not wait for the copy.
    """

    rows: Tensor
    row_of_block: Tensor
    stream: int


recent: dict[Key, Table] = {}  # oldest first
captured: dict[int, Table] = {}  # by id: a CUDA graph reads its table at every replay, so these are never freed


def fits(tensor: Tensor) -> bool:
    """Whether the kernels can read it: a dtype they know, dense in memory, in any order of dimensions."""
    if tensor.dtype not in DTYPES or tensor.data_ptr() % tensor.element_size():
        return False
    return is_dense(tensor)


def block_size(dtype: torch.dtype) -> int:
    """Elements in a block."""
    return BLOCK_BYTES // dtype.itemsize


def table_of(tensors: Sequence[Tensor], places: Sequence[int]) -> Table | None:
    """The table of non-empty tensors that fit, of one dtype on one device; ``places``: where each one's norm goes.

    The same addresses give the same table again. A new one is one asynchronous copy from pinned memory. None while a
    CUDA graph is being captured and these addresses are new: a graph must not record a copy from memory that is reused.
    Call once before the capture with the same gradients.
    """
    first = tensors[0]
    addresses = tuple(tensor.data_ptr() for tensor in tensors)
    key = (first.dtype, first.device, addresses, tuple(tensor.numel() for tensor in tensors), tuple(places))
    stream, capturing = 0, False
    if first.is_cuda:
        stream = torch.cuda.current_stream(first.device).cuda_stream
        capturing = torch.cuda.is_current_stream_capturing()
    table = recent.pop(key, None)
    if capturing:
        if table is not None:
            recent[key] = captured[id(table)] = table
        return table
    if table is None or table.stream != stream:
        table = _build(key, stream)
    recent[key] = table
    while len(recent) > KEPT:
        del recent[next(iter(recent))]  # freed in the order of its own stream: kernels that still read it come first
    return table


def _build(key: Key, stream: int) -> Table:
    dtype, device, addresses, numels, places = key
    block = block_size(dtype)
    rows, counts = [], []
    first_block = 0
    for address, numel, place in zip(addresses, numels, places, strict=True):
        begin = address % LINE // dtype.itemsize
        rows.append((address // LINE * LINE, begin, begin + numel, first_block, place))
        counts.append(-(-(begin + numel) // block))
        first_block += counts[-1]
    words = len(rows) * 5
    host = torch.empty(words + -(-first_block // 2), dtype=torch.int64, pin_memory=device.type == "cuda")
    host[:words] = torch.tensor(rows, dtype=torch.int64).view(-1)
    host[words:].view(torch.int32)[:first_block] = torch.repeat_interleave(
        torch.arange(len(rows), dtype=torch.int32), torch.tensor(counts)
    )
    memory = host.to(device, non_blocking=True)
    return Table(memory[:words].view(-1, 5), memory[words:].view(torch.int32)[:first_block], stream)
