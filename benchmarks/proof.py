"""What a proof of the layout costs, beside the clipping of a step.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/proof.py

Each round makes one `clip_()` and one `verify()` of the same Clipper, in turns, from a moment at which both ranks are
there: wall times of the slower rank, medians of the rounds, and of the rounds' ratios. Gradients are written once; the
bound is above their norm, so that no call changes them. The last column is what `verify_every=1000` adds to the
clipping of a step.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distclip import Clipper, Layout

ROUNDS = 25
EVERY = 1000


def ddp(model: nn.Module) -> Clipper:
    """Every rank holds all, as under DDP."""
    return Clipper(model, 1e9)


def fsdp2(model: nn.Module) -> Clipper:
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return Clipper(model, 1e9)


def experts(model: nn.Module) -> Clipper:
    """Every rank holds parameters of its own."""
    return Clipper(model, 1e9, layout=lambda name, p: Layout(1))


def layers(count: int, width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def cases() -> Iterator[tuple[str, Callable[[nn.Module], Clipper], nn.Module]]:
    for layout in (ddp, fsdp2, experts):
        yield f"{layout.__name__}, 300 x 256 KiB", layout, layers(300, 256)
        yield f"{layout.__name__}, 12 x 16 MiB", layout, layers(12, 2048)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        print("| gradients | clip_() | verify() | ratio | a step with verify_every=1000 |\n|---|---|---|---|---|")
    torch.manual_seed(0)  # replicas hold the same values
    for name, layout, model in cases():
        show(name, layout(model), seed=dist.get_rank() if layout is experts else 0)
    dist.destroy_process_group()


def show(name: str, clipper: Clipper, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    for p in clipper.engine.holders:
        p.grad = torch.zeros_like(p)
        local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        local.normal_(generator=chance)
    times: dict[str, list[float]] = {"clip_": [], "verify": []}
    for _ in range(ROUNDS):
        for verb, seen in times.items():
            seen.append(slowest(getattr(clipper, verb)))
    clips, proofs = (seen[1:] for seen in times.values())  # the first round warms up
    ratio = statistics.median(b / a for a, b in zip(clips, proofs, strict=True))
    if dist.get_rank() == 0:
        clip, proof = (1e3 * statistics.median(seen) for seen in (clips, proofs))
        print(f"| {name} | {clip:.1f} ms | {proof:.1f} ms | {ratio:.1f} | {1 + ratio / EVERY:.4f} |", flush=True)


def slowest(call: Callable[[], object]) -> float:
    """Seconds on the slower rank, from a moment at which both begin."""
    dist.barrier()
    start = time.perf_counter()
    call()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


if __name__ == "__main__":
    main()
