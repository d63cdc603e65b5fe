"""What an exact sum and a fingerprint cost beside the sum that a norm takes, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/exact.py

192 MiB of each kind of gradients in 48 tensors. Every round makes every call once, in turns; medians of the rounds'
processor times, and of their ratios to the sum; with each instruction set of this processor. GB/s are of gradients.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from distclip.kernels import exact_sum, fingerprints, native, power_sum
from distclip.kernels.fingerprint import whole

TENSORS, BYTES, ROUNDS = 48, 192 << 20, 15
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def main() -> None:
    torch.set_num_threads(1)
    print("| gradients | call | ratio | median | |\n|---|---|---|---|---|")
    for dtype in DTYPES:
        show(f"{dtype}, normal", gradients(dtype), dtype)
    show("torch.float32, 40 decades", gradients(torch.float32, decades=20), torch.float32)
    show("torch.float32, half of them subnormal", gradients(torch.float32) * 10.0**-38, torch.float32)


def gradients(dtype: torch.dtype, decades: float = 0) -> Tensor:
    """(tensors, elements); factors of 10 ** -decades to 10 ** decades, a tensor at a time."""
    chance = torch.Generator().manual_seed(0)
    numbers = torch.empty(TENSORS, BYTES // TENSORS // dtype.itemsize, dtype=dtype)
    for tensor in numbers:
        x = torch.randn(tensor.shape, generator=chance)
        if decades:
            x *= 10.0 ** (torch.empty(tensor.shape).uniform_(-decades, decades, generator=chance))
        tensor.copy_(x)
    return numbers


def show(what: str, numbers: Tensor, dtype: torch.dtype) -> None:
    tensors = list(numbers)
    places = [whole(t.numel()) for t in tensors]
    wide = dtype == torch.float64
    calls: dict[str, Callable[[], object]] = {
        "sum of squares": lambda: power_sum(tensors, 2.0),
        "exact sum of squares": lambda: exact_sum(tensors, 2.0, wide),
        "exact sum of absolute values": lambda: exact_sum(tensors, 1.0, wide),
        "fingerprint": lambda: fingerprints(tensors, places, range(len(tensors))),
        "multiplied in place": lambda: torch._foreach_mul_(tensors, 1.0),
    }
    times = {name: [0.0] * ROUNDS for name in calls}
    for k in range(-1, ROUNDS):  # the first one warms up
        for name, call in calls.items():
            begin = time.thread_time()
            call()
            times[name][k] = time.thread_time() - begin
    for name, its in times.items():
        median = statistics.median(its)
        ratio = statistics.median(a / b for a, b in zip(its, times["sum of squares"], strict=True))
        print(f"| {what} | {name} | {ratio:.2f} | {median * 1e3:.1f} ms | {numbers.nbytes / median / 1e9:.1f} GB/s |")


if __name__ == "__main__":
    for each in range(native.widest, -1, -1):
        native.widest = each
        print(f"\n{['portable', 'AVX2', 'AVX-512'][each]}\n")
        main()
