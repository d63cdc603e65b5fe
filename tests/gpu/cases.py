"""What the Triton kernels promise, as cases that run on any device they run on.

tests/kernels/test_triton.py runs them on the CPU, in Triton's interpreter; tests/gpu/check.py on a GPU. A case is a
function of the device that yields a line for everything that is wrong.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import inf, isnan, nan

import torch
from torch import Tensor

from distclip.kernels import triton
from distclip.kernels.triton.table import KEPT, block_size, recent, table_of
from support.oracle import true_norm

Case = Callable[[torch.device], Iterator[str]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PS = (1.0, 2.0, 3.0, inf, 0.5, 3.7)
BLOCK = block_size(torch.float32)
PROMISE = 2e-7  # relative error of a norm


def noise(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(numel + seed)).to(dtype)


def right_norm(tensor: Tensor, p: float) -> float:
    tensor = tensor.cpu()
    tensor = tensor.to(torch.complex128).abs() if tensor.is_complex() else tensor.double()
    if tensor.isnan().any():
        return nan
    return inf if tensor.isinf().any() else true_norm([tensor], p)


def wrong_norms(tensors: list[Tensor], p: float, within: float = PROMISE) -> Iterator[str]:
    norms = triton.local_norms(tensors, p)
    if norms.dtype != torch.float64 or norms.shape != (len(tensors),) or norms.device != tensors[0].device:
        yield f"got {norms.dtype} of shape {tuple(norms.shape)} on {norms.device}"
    for i, (norm, tensor) in enumerate(zip(norms.tolist(), tensors, strict=True)):
        right = right_norm(tensor, p)
        same = isnan(norm) if isnan(right) else norm == right or abs(norm - right) <= within * right < inf
        if not same:
            yield f"p={p} {tensor.dtype} {tuple(tensor.shape)}, number {i}: norm {norm!r}, should be {right!r}"


def sizes(dtype: torch.dtype, p: float, device: torch.device) -> Iterator[str]:
    """Sizes around every edge, each starting anywhere in a cache line."""
    block = block_size(dtype)
    numels = [1, 2, 7, 8, 9, 100, block // 8, block - 1, block, block + 1, 2 * block + 77]
    memory = noise(3 * block, dtype).to(device)
    yield from wrong_norms([memory[start : start + n] for start in (0, 1, 3, 64) for n in numels], p)


def constants(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Data where rounding has a direction."""
    for value in (1 / 3, 0.7, 1.9, 3.14159, 1e-3):
        full = torch.full((2 * block_size(dtype) + 5,), value).to(dtype).to(device)
        for p in (1.0, 2.0, 3.0):
            yield from wrong_norms([full], p, within=1.3e-7)


def extremes(p: float, device: torch.device) -> Iterator[str]:
    """Every power of ten of fp32 and its ends; in whole blocks, and in parts of one."""
    values = [10.0**e for e in (-45, -40, -38, -30, -20, -15, -13, -10, 0, 10, 15, 20, 30, 38)]
    for numel in (3, BLOCK + 3):
        tensors = [noise(numel).clamp_(-3, 3) * value for value in values]
        ends = (1e-45, torch.finfo(torch.float32).max, 1e-30, 1e20)
        powers_are_denormal = (7.1e-21, 1.3e-20, 5.1e-20, 2.9e-14, 3.7e-14)
        tensors += [torch.full((numel,), v) for v in (*ends, *powers_are_denormal)]
        yield from wrong_norms([t.to(device) for t in tensors], p)


def mixtures(device: torch.device) -> Iterator[str]:
    """Blocks that must be summed again beside blocks that need not."""
    plain = noise(6 * BLOCK)
    zeros = torch.zeros_like(plain)
    some = [plain.clone() for _ in range(5)]
    some[0][BLOCK : 3 * BLOCK] = 0.0
    some[1][BLOCK : 2 * BLOCK] *= 1e25
    some[2][: 5 * BLOCK] *= 1e-25
    some[3] *= 1e-25
    some[3][7] = 1e-6
    some[4][2 * BLOCK :] = 0.0
    tensors = [t.to(device) for t in [*some, zeros, zeros[:3], -zeros]]
    for p in PS:
        yield from wrong_norms(tensors, p)
    if triton.local_norms(tensors, 2.0)[5:].any():
        yield "the norm of zeros is not exactly zero"


def bad_elements(dtype: torch.dtype, p: float, device: torch.device) -> Iterator[str]:
    """NaN and infinities in a full block, in a partial one, alone, together."""
    block = block_size(dtype)
    tensors = []
    for bads in ([nan], [inf], [-inf], [nan, inf], [-inf, nan]):
        for start in (5, block - 1, block + 3):
            tensors.append(noise(block + 9, dtype))
            tensors[-1][start : start + len(bads)] = torch.tensor(bads, dtype=dtype)
        tensors.append(torch.tensor(bads, dtype=dtype))
    tensors.append(-tensors[0])  # a NaN with its sign bit set
    yield from wrong_norms([t.to(device) for t in tensors], p)


def many(device: torch.device) -> Iterator[str]:
    """600 tensors of all dtypes in one call keep their order, and the same call gives the same bits."""
    tensors = [noise(1 + 37 * i % 501, FLOATS[i % 4], seed=i).to(device) for i in range(600)]
    yield from wrong_norms(tensors, 2.0)
    if not torch.equal(triton.local_norms(tensors, 2.0), triton.local_norms(tensors, 2.0)):
        yield "two calls gave different bits"


VIEWS: dict[str, Callable[[torch.device], Tensor]] = {
    "transposed": lambda d: noise(6000).to(d).view(60, 100).t(),
    "channels_last": lambda d: noise(8 * 16 * 32).to(d).view(2, 8, 16, 16).to(memory_format=torch.channels_last),
    "sliced": lambda d: noise(6000).to(d).view(60, 100)[:, 3:41],
    "strided": lambda d: noise(4000).to(d)[::3],
    "expanded": lambda d: noise(50).to(d).expand(7, 50),
    "scalar": lambda d: noise(1).to(d)[0],
    "empty": lambda d: torch.zeros(0, 7, device=d),
    "complex64": lambda d: torch.complex(noise(500), noise(500, seed=1)).to(d),
    "complex128": lambda d: torch.complex(noise(500), noise(500, seed=1)).to(d, torch.complex128).view(50, 10).t(),
    "complex sliced": lambda d: torch.complex(noise(500), noise(500, seed=1)).to(d)[::2],
}


def layouts(p: float, device: torch.device) -> Iterator[str]:
    """Any strides; those that the kernels cannot read beside those they can."""
    yield from wrong_norms([view(device) for view in VIEWS.values()], p)
    yield from wrong_norms([VIEWS["empty"](device)], p)


def far_elements(device: torch.device) -> Iterator[str]:
    """A block 2**34 elements behind the start of its tensor (a table that says so: nobody has that much memory)."""
    from triton.language import float32

    from distclip.kernels.triton import device as kernels

    x = noise(2 * BLOCK + 200).to(device)
    begin = x.data_ptr() % 128 // 4
    far = 1 << 34
    row = [x.data_ptr() - 4 * begin - 4 * far, far + begin, far + begin + len(x), -(far // BLOCK), 0]
    blocks = -(-(begin + len(x)) // BLOCK)
    rows = torch.tensor(row, device=device)
    row_of_block = torch.zeros(blocks, dtype=torch.int32, device=device)
    sums = torch.empty(blocks, dtype=torch.float64, device=device)
    coef = torch.tensor(0.5, device=device)
    kernels.block_sums[(blocks,)](rows, row_of_block, sums, float32, 2.0, BLOCK, 4, num_warps=8)
    right = x.double().square().sum().item()
    if abs(sums.sum().item() - right) > PROMISE * right:
        yield f"sum {sums.sum().item()}, should be {right}"
    half = x * coef
    kernels.scale_blocks[(blocks,)](rows, row_of_block, coef, float32, BLOCK, num_warps=8)
    if not torch.equal(x, half):
        yield "not scaled"


def many_blocks(device: torch.device) -> Iterator[str]:
    """More block sums than one program adds at once, of a tensor that is not the first."""
    from distclip.kernels.triton import device as kernels

    blocks, first = 3 * triton.FINISH + 5, 7
    for p in (1.0, 2.0, 3.0, 3.7, inf):
        for bad in (None, inf, nan):
            sums = noise(first + blocks + 9, torch.float64).abs()
            if bad is not None:
                sums[first + blocks - 2] = bad
            rows = torch.tensor([[0, 3, 8, 0, 1], [0, 5, blocks * BLOCK - 3, first, 0]], device=device)
            norms = torch.empty(2, dtype=torch.float64, device=device)
            sums = sums.to(device)
            kernels.norms_of_rows[(2,)](rows, sums, norms, p, BLOCK, triton.FINISH, **triton.LAUNCH)
            for got, its in zip(norms.tolist(), (sums[first : first + blocks], sums[:1]), strict=True):
                right = its.max().item() if p == inf else its.sum().item() ** (1 / p)
                if not (isnan(got) and isnan(right)) and got != right and abs(got - right) > 1e-12 * right:
                    yield f"p={p} with {bad}: {got!r}, should be {right!r}"


def tables(device: torch.device) -> Iterator[str]:
    """The same addresses give the same table, others a new one; few are kept."""
    tensors = [noise(100).to(device), noise(3 * BLOCK).to(device)]
    first = table_of(tensors, (0, 1))
    if table_of(tensors, (0, 1)) is not first or table_of([t.view(1, -1) for t in tensors], (0, 1)) is not first:
        yield "built again for the same addresses"
    if table_of(tensors, (1, 0)) is first or table_of([t[1:] for t in tensors], (0, 1)) is first:
        yield "taken for other tensors"
    others = [table_of(tensors, (0, i)) for i in range(2, 2 + 2 * KEPT)]
    if [table_of(tensors, (0, i)) for i in range(2 + KEPT, 2 + 2 * KEPT)] != others[KEPT:]:
        yield "one of the latest tables was built again"
    if len(recent) > KEPT:
        yield f"{len(recent)} tables kept"
    recent.clear()
    tensors[0].zero_()  # a table knows addresses only: new values are seen
    yield from wrong_norms(tensors, 2.0)


def bits(tensors: Iterable[Tensor]) -> list[Tensor]:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.view(integers[t.element_size()]) for t in tensors]


def scaling(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """The bits of a product in fp32 that is rounded once, wherever a tensor starts, and not a bit beside it."""
    block = block_size(dtype)
    for factor in (0.123456789, 3.0, 1e-30, 1.0000001, 0.0, -1.0, 65505.0):
        coef = torch.tensor(factor, device=device)
        memory = noise(8 * block, dtype).to(device)
        memory[7:9] = torch.tensor([inf, -inf], dtype=dtype)
        right = memory.clone()
        ranges = [(0, 10), (11, 12), (64, block + 70), (block + 71, 3 * block), (4 * block, 7 * block + 1)]
        triton.scale_([memory[a:b] for a, b in ranges], coef)
        if dtype == torch.bfloat16 and device.type == "cpu":
            # Triton's interpreter cuts off where the GPU rounds (compile.py looks for the rounding in the PTX).
            for a, b in ranges:
                right[a:b] = ((right[a:b].float() * coef).view(torch.int32) >> 16).short().view(dtype)
        else:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            for a, b in ranges:  # not mul_: on CUDA it rounds a 0-d factor to the tensor's dtype before
                right[a:b] = (right[a:b].to(wide) * coef.to(wide)).to(dtype)
        if not torch.equal(memory.nan_to_num(nan=12345.0), right.nan_to_num(nan=12345.0)):
            yield f"{dtype} times {factor}: other bits in {int((memory != right).sum())} elements"


def scaling_views(device: torch.device) -> Iterator[str]:
    """Any strides, complex numbers too; and NaN times anything, anything times NaN is NaN."""
    ours, right = ([VIEWS[name](device) for name in VIEWS if name != "expanded"] for _ in range(2))
    coef = torch.tensor(0.7, device=device)
    triton.scale_(ours, coef)
    for name, x, y in zip([name for name in VIEWS if name != "expanded"], ours, right, strict=True):
        y.mul_(coef)
        if not torch.equal(
            torch.view_as_real(x) if x.is_complex() else x, torch.view_as_real(y) if y.is_complex() else y
        ):
            yield f"{name}: other bits than torch's"
    one = torch.tensor([nan, 2.0], device=device)
    triton.scale_([one], torch.tensor(0.5, device=device))
    if not one[0].isnan() or one[1] != 1.0:
        yield f"NaN, 2.0 times 0.5 gave {one.tolist()}"
    triton.scale_([one], torch.tensor(nan, device=device))
    if not one.isnan().all():
        yield f"NaN, 1.0 times NaN gave {one.tolist()}"


def scaling_by_one(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Nothing changes, not even the payload of a signalling NaN."""
    payload = {2: 0x7F81 if dtype == torch.bfloat16 else 0x7C01, 4: 0x7F800001, 8: 0x7FF0000000000001}
    memory = noise(2 * block_size(dtype) + 9, dtype).to(device)
    for integers in bits([memory]):
        integers[::100] = payload[dtype.itemsize]
    before = bits([memory])[0].clone()
    triton.scale_([memory, memory[:0]], torch.ones((), device=device))
    if not torch.equal(bits([memory])[0], before):
        yield f"{dtype} times 1 changed {int((bits([memory])[0] != before).sum())} elements"


def _cases() -> Iterator[tuple[str, Case]]:
    for dtype in FLOATS:
        name = str(dtype).removeprefix("torch.")
        for p in PS:
            yield f"sizes-{name}-{p}", partial(sizes, dtype, p)
        for p in (1.0, 2.0, 3.7, inf):
            yield f"bad_elements-{name}-{p}", partial(bad_elements, dtype, p)
        if dtype != torch.float64:
            yield f"constants-{name}", partial(constants, dtype)
        yield f"scaling-{name}", partial(scaling, dtype)
        yield f"scaling_by_one-{name}", partial(scaling_by_one, dtype)
    for p in (1.0, 2.0, 3.0, inf):
        yield f"extremes-{p}", partial(extremes, p)
    for p in PS:
        yield f"layouts-{p}", partial(layouts, p)
    for case in (mixtures, many, many_blocks, far_elements, tables, scaling_views):
        yield case.__name__, case


CASES = dict(_cases())


def wrong(name: str, device: str) -> list[str]:
    """Run a case; what it found wrong."""
    return list(CASES[name](torch.device(device)))
