"""Many steps of clipping on one rank: what grows, what leaks, what becomes slower.

    python tests/soak/soak.py --ranks 2 --steps 100000

Time is taken in blocks of steps, each beside a block of a fixed reference load on the same ranks, so that a machine
that others use decides nothing: `drift` is the median ratio of the two over the last tenth, by that over the first.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, nan
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import distclip

BLOCK = 50  # steps
NAN_EVERY = 97  # steps
WAYS = ("clipper", "function")
TORCH = "none"  # a step without clipping: how much torch grows by itself
PAGE = os.sysconf("SC_PAGE_SIZE")

Step = Callable[[int], None]


@dataclass(frozen=True)
class Held:
    """What this process holds of the machine, once garbage is collected and the allocator has given back its rest."""

    megabytes: float
    descriptors: int
    threads: int
    objects: int

    @classmethod
    def now(cls) -> "Held":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        descriptors, threads = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("fd", "task"))
        return cls(pages * PAGE / 1e6, descriptors, threads, len(gc.get_objects()))


@dataclass(frozen=True)
class Figures:
    way: str
    ranks: int
    steps: int
    skipped: int
    seconds: float  # reference load included
    step_ms: float  # median
    megabytes: float  # resident after warming up
    grown: float  # megabytes since then
    growth: list[float]  # the same at every tenth of the way
    descriptors: int  # more than after warming up, as all below
    threads: int
    objects: int
    drift: float
    drift_cpu: float  # the same in CPU time of this process


class Loop:
    """A training loop with a NaN now and then. The two ways skip those steps and make the others alike."""

    def __init__(self, way: str) -> None:
        torch.manual_seed(0)
        net: nn.Module = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 1))
        self.model = DistributedDataParallel(net) if dist.is_initialized() else net
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.act: Callable[[], object] = self.clip_by_function if way == "function" else self.optimizer.step
        self.spikes = way != TORCH
        if way == "clipper":
            self.clipper = distclip.Clipper(self.model, distclip.AutoClip(percentile=50, window=100))
            self.act = self.clip_by_clipper
        self.generator = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
        self.skipped = 0
        self.words = torch.zeros(2, dtype=torch.float64)
        self.square = torch.randn(64, 64)

    def step(self, number: int) -> None:
        x = torch.randn(8, 16, generator=self.generator)
        if number % NAN_EVERY == 0 and self.spikes:
            x[0, 0] = nan
        self.model(x).square().mean().backward()
        self.act()
        self.optimizer.zero_grad()

    def clip_by_clipper(self) -> None:
        self.skipped += self.clipper.step(self.optimizer).skip.item()

    def clip_by_function(self) -> None:
        norm = distclip.clip_grad_norm_(self.model.parameters(), 0.1)
        if isfinite(norm):
            self.optimizer.step()
        else:
            self.skipped += 1

    def reference(self, number: int) -> None:
        """Work of the same kind without clipping: small kernels, and an all-reduce where there are ranks."""
        result: Tensor = self.square
        for _ in range(10):
            result = torch.tanh(result @ self.square)
        if dist.is_initialized():
            dist.all_reduce(self.words)


def timed(act: Step, first: int) -> tuple[float, float]:
    """Seconds of a block of calls, and seconds of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    for number in range(first, first + BLOCK):
        act(number)
    return time.perf_counter() - wall, time.process_time() - cpu


def drift(ratios: Sequence[float]) -> float:
    tenth = max(1, len(ratios) // 10)
    return median(ratios[-tenth:]) / median(ratios[:tenth])


def soak(way: str, steps: int, warm_up: int, beside: Step | None = None) -> Figures:
    """`steps` steps on this rank after `warm_up` that do not count. All ranks of the default group call.

    `beside` is called in every step that counts: what a test lets leak.
    """
    loop = Loop(way)
    for number in range(1, warm_up + 1):
        loop.step(number)
        loop.reference(number)
    blocks = steps // BLOCK
    walls, cpus, each = (array("d", bytes(8 * blocks)) for _ in range(3))  # all their memory is taken here
    looks = array("d", bytes(8 * 10))
    before = Held.now()
    began = time.perf_counter()
    for block in range(blocks):
        first = warm_up + 1 + block * BLOCK
        wall, cpu = timed(loop.step, first)
        if beside is not None:
            timed(beside, first)
        reference_wall, reference_cpu = timed(loop.reference, 0)
        walls[block], cpus[block], each[block] = wall / reference_wall, cpu / reference_cpu, wall / BLOCK
        if block * 10 // blocks != (block - 1) * 10 // blocks:
            looks[block * 10 // blocks] = Held.now().megabytes
    seconds = time.perf_counter() - began
    after = Held.now()
    return Figures(
        way=way,
        ranks=dist.get_world_size() if dist.is_initialized() else 1,
        steps=blocks * BLOCK,
        skipped=loop.skipped,
        seconds=round(seconds, 1),
        step_ms=round(median(each) * 1e3, 3),
        megabytes=round(before.megabytes, 1),
        grown=round(after.megabytes - before.megabytes, 2),
        growth=[round(look - before.megabytes, 2) for look in looks],
        descriptors=after.descriptors - before.descriptors,
        threads=after.threads - before.threads,
        objects=after.objects - before.objects,
        drift=round(drift(walls), 3),
        drift_cpu=round(drift(cpus), 3),
    )


def faults(figures: Figures, drift_allowed: float) -> list[str]:
    """What of the promise this rank did not keep."""
    found = {
        f"grew by {figures.grown} MB": figures.grown >= 5,
        f"{figures.descriptors} descriptors leaked": figures.descriptors > 0,
        f"{figures.threads} threads leaked": figures.threads > 0,
        f"CPU time of a step is {figures.drift_cpu} of what it was": figures.drift_cpu > drift_allowed,
        "no step was skipped": figures.skipped == 0 and figures.way != TORCH,
    }
    return [fault for fault, there in found.items() if there]


def run_rank(rank: int, ranks: int, folder: str, way: str, steps: int, warm_up: int) -> None:
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    figures = soak(way, steps, warm_up)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(asdict(figures)))
    if ranks > 1:
        dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description="Soak: many steps, and what grows")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--warm-up", type=int, default=2000)
    parser.add_argument("--way", choices=[*WAYS, TORCH], default="clipper")
    words = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        spawn(run_rank, (words.ranks, folder, words.way, words.steps, words.warm_up), nprocs=words.ranks)
        all_figures = [Figures(**json.loads(file.read_text())) for file in sorted(Path(folder).glob("rank-*.json"))]
    failed = False
    for rank, figures in enumerate(all_figures):
        found = faults(figures, drift_allowed=1.1)
        failed = failed or bool(found)
        print(json.dumps({"rank": rank, **asdict(figures), "load": os.getloadavg()[0], "faults": found}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
