"""What comparing the bits of copies costs: `clip_()` with `on_drift="warn"` beside `"ignore"`, in turns.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/drift.py

Every rank holds all gradients. Medians of rank 0's wall time after a barrier, and the ratio of these.
"""

import statistics
import time

import torch
import torch.distributed as dist
from torch import nn

import distclip

CASES = [("288 x 16 KiB", 288, 16 << 10, 1500), ("48 x 1 MiB", 48, 1 << 20, 300), ("12 x 16 MiB", 12, 16 << 20, 60)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def measured(model: nn.Module, rounds: int) -> dict[str, float]:
    """The median of a call's seconds, by `on_drift`."""
    clippers = {what: distclip.Clipper(model, 1e9, on_drift=what) for what in ("warn", "ignore")}
    for clipper in clippers.values():
        for _ in range(9):  # more is compared in calls 1, 2, 4 and 8
            clipper.clip_()
    times: dict[str, list[float]] = {what: [] for what in clippers}
    for k in range(rounds):
        for what in sorted(clippers, reverse=k % 2 == 0):
            dist.barrier()
            begin = time.perf_counter()
            clippers[what].clip_()
            times[what].append(time.perf_counter() - begin)
    return {what: statistics.median(its) for what, its in times.items()}


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    if dist.get_rank() == 0:
        print("| gradients | ignore | warn | ratio |\n|---|---|---|---|")
    for name, tensors, size, rounds in CASES:
        for dtype in DTYPES:
            torch.manual_seed(0)
            model = nn.ParameterList(torch.zeros(size // dtype.itemsize, dtype=dtype) for _ in range(tensors))
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            found = measured(model, rounds)
            if dist.get_rank() == 0:
                ratio = found["warn"] / found["ignore"]
                warn, ignore = (f"{found[what] * 1e3:.2f} ms" for what in ("warn", "ignore"))
                print(f"| {dtype}, {name} | {ignore} | {warn} | {ratio:.3f} |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
