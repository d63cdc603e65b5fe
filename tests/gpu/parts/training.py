"""Whole training steps of a GPT, without clipping, with ours and with torch's: DDP, FSDP2, bf16, fp16; a ZeRO step."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip.bench.models import Gpt
from gpu.chip import Chip
from gpu.readings import Readings, reading

from . import part
from .groups import one_rank

SYMBOLS = 256
ROUNDS = 8


@dataclass
class Job:
    """A model and how it is trained: ``autocast`` in this dtype, by a scaler for fp16."""

    chip: Chip
    model: nn.Module
    autocast: torch.dtype | None = None
    scaled: bool = False
    optimizer: torch.optim.Optimizer = field(init=False)
    scaler: torch.amp.GradScaler | None = field(init=False)

    def __post_init__(self) -> None:
        fused: Any = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)  # all the work, and nothing moves
        self.optimizer = fused
        kind = self.chip.device.type
        self.scaler = torch.amp.GradScaler(kind, init_scale=1024.0, growth_interval=10**6) if self.scaled else None
        batch, time = (8, 1024) if self.chip.real else (2, 8)
        tokens = torch.randint(SYMBOLS, (batch, time + 1), generator=torch.Generator().manual_seed(0))
        tokens = tokens.to(self.chip.device)
        self.x, self.y = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()

    def backward(self) -> None:
        self.optimizer.zero_grad()
        enabled = self.autocast is not None
        with torch.autocast(self.chip.device.type, self.autocast or torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(self.model(self.x).flatten(0, 1).float(), self.y)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def bare(self) -> None:
        self.backward()
        self.finish()

    def by_torch(self, max_norm: float) -> None:
        self.backward()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self.finish()

    def by_us(self, clipper: distclip.Clipper) -> None:
        self.backward()
        self.clip_and_finish(clipper)

    def clip_and_finish(self, clipper: distclip.Clipper) -> distclip.Report:
        report = clipper.step(self.optimizer, scaler=self.scaler)
        if self.scaler is not None:
            self.scaler.update()
        return report

    def finish(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def norm(self) -> float:
        """Of the gradients of the latest backward, unscaled, in float64: another one may round otherwise."""
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        parts = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in self.model.parameters()]
        norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in parts]
        return torch.linalg.vector_norm(torch.stack(norms)).item() / scale


def gpt(chip: Chip, dtype: torch.dtype = torch.float32) -> Gpt:
    """300 million parameters on a GPU, heads of 256: a step of tens of ms."""
    torch.manual_seed(0)
    layers, width, time = (24, 1024, 1024) if chip.real else (1, 16, 8)
    with torch.device(chip.device):
        return Gpt(layers=layers, width=width, time=time, symbols=SYMBOLS).to(dtype)


def ddp(chip: Chip) -> Job:
    return Job(chip, DistributedDataParallel(gpt(chip), gradient_as_bucket_view=True), torch.bfloat16)


def fsdp2(chip: Chip) -> Job:
    model, mesh = gpt(chip), init_device_mesh(chip.device.type, (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return Job(chip, fully_shard(model, mesh=mesh, mp_policy=policy))


def bf16(chip: Chip) -> Job:
    return Job(chip, gpt(chip, torch.bfloat16))


def fp16(chip: Chip) -> Job:
    return Job(chip, gpt(chip), torch.float16, scaled=True)


def measured(chip: Chip, name: str, job: Job) -> Readings:
    """The norm, its peak of memory, and how long a step takes."""
    job.backward()
    max_norm = job.norm() / 10
    clipper = distclip.Clipper(job.model, max_norm)
    for turn in range(3):
        job.backward()
        right = job.norm()
        report = job.clip_and_finish(clipper)
        yield reading("norm", f"{name}, step {turn}", report.norm.item(), right=right)
        yield reading("true", f"{name}, step {turn} clips", bool(report.coef < 0.11) and not bool(report.skip))
    job.backward()
    more = chip.peak(lambda: job.clip_and_finish(clipper))
    yield reading("bytes", f"{name}: step()", more, parameters=len(list(job.model.parameters())))
    calls: dict[str, Callable[[], object]] = {
        "bare": job.bare,
        "ours": lambda: job.by_us(clipper),
        "torch": lambda: job.by_torch(max_norm),
    }
    times = chip.milliseconds(calls, ROUNDS)
    yield reading("step", f"{name}: with clipping, by one without", times["ours"], right=times["bare"])
    yield reading("times", f"{name}: with clipping, by one with torch's", times["ours"], right=times["torch"])
    yield reading("fact", f"{name}: elements", sum(p.numel() for p in job.model.parameters()))


@part(needs={"norm": 12, "true": 12, "bytes": 4, "step": 4, "times": 4}, seconds=60, alone=True)
def training(chip: Chip) -> Readings:
    """Every job in turn, so that one that is cut off leaves the others."""
    with one_rank(chip):
        for make in (ddp, fsdp2, bf16, fp16):
            if chip.device.type == "cpu" and make is fp16:
                make = float16_on_the_host
            yield from measured(chip, make.__name__, make(chip))
            if chip.real:
                torch.cuda.empty_cache()


def float16_on_the_host(chip: Chip) -> Job:
    """fp32 with a scaler: CPUs do not autocast a whole GPT to fp16."""
    return Job(chip, gpt(chip), scaled=True)


@part(seconds=40)
def zero(chip: Chip) -> Readings:
    """A step of DeepSpeed's ZeRO 2, where it is installed: its norm is ours."""
    if find_spec("deepspeed") is None:
        yield reading("fact", "DeepSpeed is not installed", "left out")
        return
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, and not used
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **places}
    yield from zero_steps(chip)


def zero_steps(chip: Chip) -> Readings:
    import deepspeed

    from distclip.integrations.deepspeed import take_over

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 50), nn.GELU(), nn.Linear(50, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2},
        "gradient_clipping": 0.0,
        "zero_force_ds_cpu_optimizer": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        deepspeed.init_distributed(chip.backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        clipper = take_over(engine, 1.0)
        x = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)).to(engine.device)
        for step in range(3):
            loss = 100 * engine(x).square().mean()
            right = expected(engine.module, x)
            engine.backward(loss)
            engine.step()
            yield reading("norm", f"ZeRO 2, step {step}", clipper.report.norm.item(), right=right)
        dist.destroy_process_group()


def expected(model: nn.Module, x: Tensor) -> float:
    """The norm of the gradients of the same loss, by a copy."""
    from copy import deepcopy

    twin = deepcopy(model)
    for parameter in twin.parameters():
        parameter.grad = None
    (100 * twin(x).square().mean()).backward()
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in twin.parameters()]
    return torch.linalg.vector_norm(torch.stack(norms)).item()
