"""Process groups on one GPU: NCCL with one rank, and two ranks that talk through Gloo."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from gpu.chip import Chip
from gpu.readings import Readings, reading, right_norm

from . import part
from .steps import adamw, clipped, fill, model_of, quietly, spoiled, stepped

LIMIT = 60  # seconds for the two ranks


@contextmanager
def one_rank(chip: Chip) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(chip.backend, store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


@part(needs={"silent": 17, "norm": 18, "left": 10, "true": 12}, seconds=30)
def nccl(chip: Chip) -> Readings:
    """A group of one rank: a plain model, MAX for inf, and FSDP2."""
    with one_rank(chip):
        for name, options in {"plain": {}, "inf": {"norm_type": torch.inf}}.items():
            model, p = model_of(chip), options.get("norm_type", 2.0)
            clipper = distclip.Clipper(model, 1.0, **options)
            fill(chip, model, 6)
            clipper.clip_()
            yield from clipped(chip, name, model, clipper, p)
            yield from stepped(chip, name, model, clipper, p)
            yield from spoiled(chip, name, model, clipper)
        yield from fsdp2(chip)


def fsdp2(chip: Chip) -> Readings:
    torch.manual_seed(0)
    sharded = nn.Sequential(nn.Linear(257, 511), nn.GELU(), nn.Linear(511, 3)).to(chip.device)
    fully_shard(sharded, mesh=init_device_mesh(chip.device.type, (1,)))
    clipper = distclip.Clipper(sharded, 1.0)
    for seed, scale in enumerate((1.0, 1.0, 30.0, 1e-6)):
        sharded(torch.full((8, 257), scale, device=chip.device)).square().sum().backward()
        right = right_norm([chip.host(p.grad.full_tensor()) for p in sharded.parameters()])
        report, silent = (clipper.clip_(), None) if seed == 0 else quietly(chip, "FSDP2 clip_()", clipper.clip_)
        if silent is not None:
            yield silent
        if report is None:
            return
        yield reading("norm", f"FSDP2, step {seed}", report.norm.item(), right=right)
        left = right_norm([chip.host(p.grad.full_tensor()) for p in sharded.parameters()])
        yield reading("left", f"FSDP2, step {seed}", left, right=min(1.0, right), dtype="float32")
        sharded.zero_grad()


@part(needs={"norm": 16, "left": 12, "true": 8}, seconds=40)
def two_ranks(chip: Chip) -> Readings:
    """Two ranks on the one GPU, whose words travel through Gloo: copies (DDP), stages, and a NaN on one of them."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_of_two, args=(folder, type(chip), chip.road), nprocs=2)
        for rank in range(2):
            yield from json.loads(Path(folder, f"{rank}.json").read_text())


def rank_of_two(rank: int, folder: str, kind: Callable[[str], Chip], road: str) -> None:
    chip = kind(road)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    found = [*copies(chip, rank), *stages(chip, rank)]
    dist.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def copies(chip: Chip, rank: int) -> Readings:
    """DDP: the norm of the mean, the same bits on both, and a NaN that one of them meets."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(30, 50), nn.GELU(), nn.Linear(50, 2)).to(chip.device))
    clipper, optimizer = distclip.Clipper(model, 1.0), adamw(model)
    for seed in range(3):
        x = torch.randn(16, 30, generator=torch.Generator().manual_seed(10 * seed + rank)).to(chip.device)
        optimizer.zero_grad()
        (100 * model(x).square().mean()).backward()
        right = right_norm([chip.host(p.grad) for p in model.parameters()])
        report = clipper.clip_() if seed == 0 else clipper.step(optimizer)
        norm = report.norm.item()
        yield reading("norm", f"DDP rank {rank}, step {seed}", norm, right=right)
        if seed == 0:
            left = right_norm([chip.host(p.grad) for p in model.parameters()])
            yield reading("left", f"DDP rank {rank}", left, right=min(1.0, right), dtype="float32")
        yield from agreed(f"DDP rank {rank}, step {seed}", norm)
    old = [chip.host(p) for p in model.parameters()]
    if rank == 1:
        next(model.parameters()).grad.view(-1)[3] = torch.nan
    report = clipper.step(optimizer)
    yield reading("true", f"rank {rank} skips the NaN of rank 1", bool(report.skip))
    same = all(torch.equal(a, chip.host(b)) for a, b in zip(old, model.parameters(), strict=True))
    yield reading("true", f"rank {rank} keeps its parameters", same)
    yield reading("true", f"rank {rank} names rank 1 ({clipper.culprit})", "rank 1" in str(clipper.culprit))


def stages(chip: Chip, rank: int) -> Readings:
    """Parameters of which each rank holds others: the norm is that of both."""
    values = [torch.randn(40 + r, generator=torch.Generator().manual_seed(r)) for r in range(2)]
    for p in (2.0, 1.0, torch.inf):
        weight = nn.Parameter(torch.zeros(40 + rank, device=chip.device))
        weight.grad = values[rank].to(chip.device, copy=True)
        clipper = distclip.Clipper(nn.ParameterList([weight]), 0.5, norm_type=p, split_over=[dist.group.WORLD])
        for name in ("clip_grad_norm_", "clip_"):
            weight.grad.copy_(values[rank])
            if name == "clip_":
                norm = clipper.clip_().norm
            else:
                norm = distclip.clip_grad_norm_([weight], 0.5, norm_type=p, split_over=[dist.group.WORLD])
            right = right_norm(values, p)
            yield reading("norm", f"stages rank {rank}, {name} p={p}", norm.item(), right=right)
            left, right = right_norm([chip.host(weight.grad)], p), 0.5 * right_norm([values[rank]], p) / (right + 1e-6)
            yield reading("left", f"stages rank {rank}, {name} p={p}", left, right=right, dtype="float32")


def agreed(what: str, norm: float) -> Readings:
    both = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
    dist.all_gather(both, torch.tensor(norm, dtype=torch.float64))
    yield reading("true", f"{what}: both ranks have the same bits", bool(both[0] == both[1]))
