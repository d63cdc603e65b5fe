"""What no clipping on this machine can beat: bytes over bandwidth, and the latency of one small all-reduce.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/limits.py

Both ranks pass over memory at the same time, as they do in a training step; the all-reduce starts at one moment on
both. Times are medians of 31 rounds of the slower rank, interleaved.
"""

import statistics
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.bench.rounds import share_a_clock, start_together
from distclip.kernels import native, power_sum

ROUNDS = 31
CPU = torch.device("cpu")


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tensors = [torch.randn(1 << 20) for _ in range(48)]
    size = sum(t.nbytes for t in tensors)
    one, words = torch.tensor(1.0), torch.zeros(2, dtype=torch.float64)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "torch's fp32 norm of 192 MiB (read once)": (lambda: torch._foreach_norm(tensors), size),
        f"ours, {native.name()}": (lambda: power_sum(tensors, 2.0), size),
        "ours, torch's kernels": (lambda: by_torch(tensors), size),
        "multiply 192 MiB in place (read and written once)": (lambda: torch._foreach_mul_(tensors, one), 2 * size),
        "all-reduce of two float64 words": (lambda: dist.all_reduce(words), 0),
    }
    one_clock = share_a_clock(None, CPU)
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, (call, _) in calls.items():
            start_together(None, CPU, one_clock)
            start = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - start)
    table = torch.tensor([took[name] for name in calls], dtype=torch.float64)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        for (name, (_, moved)), times in zip(calls.items(), table.tolist(), strict=True):
            seconds = statistics.median(times)
            rate = f"{moved / seconds / 1e9:6.1f} GB/s" if moved else ""
            print(f"{name:52} {1e3 * seconds:8.3f} ms {rate}")
    dist.destroy_process_group()


def by_torch(tensors: list[Tensor]) -> float:
    """What an install without a C compiler does."""
    with patch.object(native, "kernel", None):
        return power_sum(tensors, 2.0)


if __name__ == "__main__":
    main()
