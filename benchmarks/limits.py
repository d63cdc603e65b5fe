"""What no clipping on this machine can beat: bytes over bandwidth, one small all-reduce, a read of every `.grad`.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/limits.py

First the parts: both ranks pass over memory at the same time, as in a training step; the all-reduce starts at one
moment on both. Times are medians of 31 rounds of the slower rank, interleaved.

Then the cases of `distclip bench` with many small gradients, against the least that a call can do: read every `.grad`,
sum and scale memory at addresses known beforehand, and all-reduce two numbers. It checks nothing, so a gradient that
has changed or moved would go unnoticed; it decides and reports nothing.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.bench.case import Case, Contest
from distclip.bench.cases import BUCKETS, MEDIUM, SMALL
from distclip.bench.contests import SubjectOf, clipping
from distclip.bench.place import Place
from distclip.bench.rounds import measure, share_a_clock, start_together
from distclip.bench.subject import Subject, gradient_of
from distclip.bench.table import heading, line
from distclip.kernels import native, power_sum

ROUNDS = 31
CPU = torch.device("cpu")


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    show_parts()
    place, cases = Place.here(CPU), list(least_cases())
    if place.rank == 0:
        print("\n" + heading(width := max(len(case.name) for case in cases)))
    for case in cases:
        result = measure(case, place, case.rounds)
        if place.rank == 0 and result is not None:
            print(line(result, width))
    dist.destroy_process_group()


def show_parts() -> None:
    """Bytes over bandwidth, and the latency of an all-reduce."""
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


def by_torch(tensors: list[Tensor]) -> float:
    """What an install without a C compiler does."""
    with patch.object(native, "kernel", None):
        return power_sum(tensors, 2.0)


def least_cases() -> list[Case]:
    """The goals are those of the same cases of `distclip bench`."""
    make = partial(Case, what="", over=("torch", "least"), rounds=60)
    return [
        make(name="fsdp2-small-repeated", build=partial(least, subject_of=SMALL), goal=5),
        make(name="fsdp2-small-fresh", build=partial(least, subject_of=SMALL, fresh=True), goal=4.5),
        make(name="fsdp2-medium-repeated", build=partial(least, subject_of=MEDIUM), goal=3),
        make(name="fsdp2-medium-fresh", build=partial(least, subject_of=MEDIUM, fresh=True), goal=2.5),
        make(name="ddp-small-function", build=partial(least, subject_of=BUCKETS, talks=False), goal=6.5),
        make(name="ddp-small-clipper", build=partial(least, subject_of=BUCKETS), goal=3.3),
        make(name="ddp-small-fresh", build=partial(least, subject_of=BUCKETS, fresh=True), goal=2.5),
    ]


def least(place: Place, subject_of: SubjectOf, *, fresh: bool = False, talks: bool = True) -> Contest:
    """torch's function and ours, and the least that a call can do."""
    subjects: list[Subject] = []

    def kept(place: Place) -> Subject:
        subjects.append(subject_of(place))
        return subjects[-1]

    contest = clipping(place, kept, by="clipper" if talks else "function", fresh=fresh)
    parameters = subjects[0].parameters
    words, coef, norm = torch.zeros(2, dtype=torch.float64), torch.tensor(0.1), torch.tensor(contest.norm)
    runs: list[Tensor] = []

    def prepare() -> None:
        contest.prepare()
        runs[:] = merged([gradient_of(parameter) for parameter in parameters])

    def call() -> Tensor:
        gradients = [parameter.grad for parameter in parameters]
        words[0] = power_sum(runs, 2.0)
        if talks:
            dist.all_reduce(words)
        words.tolist()
        torch._foreach_mul_(runs, coef)
        del gradients
        return norm

    return replace(contest, calls={**contest.calls, "least": call}, prepare=prepare)


def merged(tensors: list[Tensor]) -> list[Tensor]:
    """One tensor for all that lie in one storage."""
    storages: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    found = []
    for parts in storages.values():
        first = min(parts, key=Tensor.data_ptr)
        found.append(first.as_strided((sum(t.numel() for t in parts),), (1,), first.storage_offset()))
    return found


if __name__ == "__main__":
    main()
