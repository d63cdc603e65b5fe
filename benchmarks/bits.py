"""The bits of some 900 steps, so that a refactor can prove that it changed none.

    python benchmarks/bits.py record before.json    # with the revision before
    python benchmarks/bits.py compare before.json   # with the revision after: lists what differs and exits 1

Records the distclip that Python imports, whose folder is printed, by its public names only: `PYTHONPATH=<a checkout>`
records another revision with the same file. Small models are trained on the CPU, on one rank and on two and four Gloo
ranks of one thread each: once with the compiled kernel, and once with DISTCLIP_NATIVE=0. In every step each rank notes

* `norm`, `max_norm`, `coef`, `skip` of the report, or the norm that a function returned: dtype and `float.hex`;
* `culprit`: kind, parameter and ranks, where a norm is not finite; `error`: the class of what was raised;
* sha256 of the bytes that this rank holds of the `parameters` after the step, of the `gradients` where a caller may use
  them, and of the policy's state, beside the counters, in `state_dict()`.

Two records of one revision on one machine are equal. Another processor or torch may change bits by itself: record both
revisions there. It takes one to two minutes on two cores, and needs Linux to see whether the kernel was loaded.

Made on 2026-11-30 to hold the bits of revision 4517729 while its files moved into packages. Of its 78 scenarios, 39
with each kernel, one change of that revision at a time was seen by: 2e-6 for 1e-6 in the coefficient, 72 (the others
have policies with a formula of their own); no optimizer folds, 58; a skipped step counts twice, 48; rows of 128 in
place of 64 where torch's kernels sum, 30 of the 39 without the compiled one.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from ctypes import string_at
from dataclasses import dataclass
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import distclip
from distclip import AutoClip, Clipper, Decision, Layout, Report, Statistics, Units, ValueClip

ROWS, WORDS, WIDTH = 8, 31, 12
NORM_TYPES = (1.0, 2.0, 3.0, inf)
SCALES = (1.0, 30.0, 0.01, 5.0)  # of the loss, in turn: with BOUND some steps clip and some do not
BOUND = 1.0

Noted = dict[str, Any]
Steps = Iterator[Noted]


# ---- what is noted --------------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.coalesce().to_dense() if tensor.layout == torch.sparse_coo else tensor


def digest(tensors: Iterator[Tensor | None]) -> str:
    """The sha256 of dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            found.update(b"none")
            continue
        raw = local(tensor).contiguous().flatten()
        found.update(f"{raw.dtype} {tuple(tensor.shape)}".encode())
        found.update(string_at(raw.data_ptr(), raw.nbytes))
    return found.hexdigest()


def exact(number: Tensor) -> str:
    return f"{number.dtype} {number.item()}" if number.dtype == torch.bool else f"{number.dtype} {number.item().hex()}"


def of_report(report: Report) -> Noted:
    fields = {name: exact(getattr(report, name)) for name in ("norm", "max_norm", "coef", "skip")}
    who = report.culprit
    return fields if who is None else {**fields, "culprit": [who.kind, who.parameter, who.rank, *who.ranks]}


def of_model(model: nn.Module) -> Noted:
    return {"parameters": digest(iter(model.parameters()))}


def of_gradients(model: nn.Module) -> Noted:
    return {"gradients": digest(p.grad for p in model.parameters())}


def of_state(clipper: Clipper) -> Noted:
    state = clipper.state_dict()
    policy = [value for _, value in sorted(state["policy"].items())]
    return {"state": f"{state['steps']} {state['consecutive_skips']} {digest(iter(policy))}"}


# ---- models and their gradients -------------------------------------------------------------------------------------


class Block(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Net(nn.Module):
    """Sizes that two ranks do not divide; an embedding, norms, a head."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH, sparse=sparse)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, words: Tensor) -> Tensor:  # (rows, 6) int64 -> (rows, 3)
        x = self.embed(words)
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean(1)


def net(dtype: torch.dtype = torch.float32, seed: int = 0, **options: bool) -> Net:
    torch.manual_seed(seed)
    return Net(**options).to(dtype)


def backward(
    model: nn.Module, step: int, part: int = 0, parts: int = 1, factor: float = 1.0, scaler: GradScaler | None = None
) -> None:
    """Gradients of a part of the step's batch."""
    chance = torch.Generator().manual_seed(step)
    words = torch.randint(WORDS, (ROWS, 6), generator=chance).chunk(parts)[part]
    targets = torch.randn(ROWS, 3, generator=chance).chunk(parts)[part]
    loss = (model(words).float() - targets).square().mean() * SCALES[step % len(SCALES)] * factor
    (loss if scaler is None else scaler.scale(loss)).backward()


def by_rank(model: nn.Module, step: int, **options: Any) -> None:
    backward(model, step, dist.get_rank(), dist.get_world_size(), **options)


def spoil(model: nn.Module, value: float, rank: int = 0) -> None:
    """One element of the last gradient of ``rank`` is ``value``."""
    if not dist.is_initialized() or dist.get_rank() == rank:
        gradient = [p.grad for p in model.parameters() if p.grad is not None and local(p.grad).numel()][-1]
        local(gradient).view(-1)[0] = value


def sharded(model: Net, mesh: Any = None, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model: Net, mesh: Any) -> Net:
    """With sequence-parallel norms, whose gradients are pending sums, and a row-wise embedding."""
    plan: dict[str, Any] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for i in range(len(model.blocks)):
        plan[f"blocks.{i}.0"] = SequenceParallel()
        plan[f"blocks.{i}.1"] = ColwiseParallel(input_layouts=Shard(1))
        plan[f"blocks.{i}.3"] = RowwiseParallel(output_layouts=Shard(1))
    return parallelize_module(model, mesh, plan)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-2, fused=True)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=1e-2, momentum=0.9)


# ---- loops ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """Some steps of one model; in the steps of ``spoilt`` a rank's gradient is not finite."""

    model: nn.Module
    optimizer: Optimizer
    gradients: Callable[..., None] = by_rank
    spoilt: tuple[tuple[int, float], ...] = ()

    def each(self, steps: int, start: int = 0, **options: Any) -> Iterator[int]:
        for step in range(start, start + steps):
            self.gradients(self.model, step, **options)
            for when, value in self.spoilt:
                if when == step:
                    spoil(self.model, value, step % 2)
            yield step
            self.optimizer.zero_grad()

    def stepped(self, clipper: Clipper, steps: int = 6, start: int = 0, scaler: GradScaler | None = None) -> Steps:
        """By ``Clipper.step``."""
        for step in self.each(steps, start, **({} if scaler is None else {"scaler": scaler})):
            measured = of_report(clipper.measure()) if step % 2 else {}  # it may redistribute what step() would
            fields = {f"measured {name}": value for name, value in measured.items()}
            fields |= of_report(clipper.step(self.optimizer, scaler=scaler))
            if scaler is not None:
                scaler.update()
                fields["scale"] = scaler.get_scale().hex()
            yield fields | of_model(self.model) | of_state(clipper)

    def clipped(self, clipper: Clipper, steps: int = 6) -> Steps:
        """By ``Clipper.clip_``, and the optimizer's own step."""
        for _ in self.each(steps):
            report = clipper.clip_()
            fields = of_report(report) | of_gradients(self.model)
            if not report.skip:
                self.optimizer.step()
            yield fields | of_model(self.model) | of_state(clipper)

    def attached(self, clipper: Clipper, steps: int = 6) -> Steps:
        """By ``optimizer.step()``, to which the Clipper is attached."""
        for _ in self.each(steps):
            self.optimizer.step()
            assert clipper.report is not None
            yield of_report(clipper.report) | of_model(self.model) | of_state(clipper)

    def by_function(self, clip: Callable[[nn.Module], Tensor | None], steps: int = 4, finite: bool = True) -> Steps:
        """By a function, in the place of torch's."""
        for _ in self.each(steps):
            norm = clip(self.model)
            fields = of_gradients(self.model) | ({} if norm is None else {"norm": exact(norm)})
            if finite:
                self.optimizer.step()
            yield fields | of_model(self.model)


def clip_norm(norm_type: float, **options: Any) -> Callable[[nn.Module], Tensor]:
    return lambda model: distclip.clip_grad_norm_(model.parameters(), BOUND, norm_type, **options)


def norm_then_clip(model: nn.Module) -> Tensor:
    norm = distclip.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    distclip.clip_grads_with_norm_(model.parameters(), BOUND, norm)
    return norm


def clip_value(bounds: float | tuple[float, float]) -> Callable[[nn.Module], None]:
    return lambda model: distclip.clip_grad_value_(model.parameters(), bounds)


NORMS = (*map(clip_norm, NORM_TYPES), norm_then_clip)
VALUES = (clip_value(1e-3), clip_value((-2e-3, 5e-4)))


def functions(
    make: Callable[[], nn.Module], gradients: Callable[..., None] = by_rank, calls=(*NORMS, *VALUES)
) -> Steps:
    """All four, on models that ``make`` cuts up."""
    for call in calls:
        model = make()
        yield from Loop(model, sgd(model), gradients).by_function(call)


def norm_types(make: Callable[[], nn.Module], gradients: Callable[..., None] = by_rank) -> Steps:
    for p in NORM_TYPES:
        model = make()
        yield from Loop(model, adamw(model), gradients).stepped(Clipper(model, BOUND, norm_type=p), 4)


# ---- one process ----------------------------------------------------------------------------------------------------


class Weights(nn.Module):
    """What a layout or a size may change in the kernels: large, empty, 0-d, transposed, channels last, mixed dtypes."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        shapes = [(300_001,), (0, 3), (), (70, 50), (2, 3, 8, 8), (17,), (5, 33)]
        self.each = nn.ParameterList(nn.Parameter(torch.zeros(s, dtype=d)) for d in dtypes for s in shapes)

    def fill(self, step: int, scale: float = 1.0) -> None:
        chance = torch.Generator().manual_seed(step)
        for p in self.each:
            gradient = (torch.randn(p.shape, generator=chance) * scale).to(p.dtype)
            if p.dim() == 2 and p.numel():
                gradient = gradient.t().contiguous().t()
            elif p.dim() == 4:
                gradient = gradient.contiguous(memory_format=torch.channels_last)
            p.grad = gradient


def dtypes() -> Steps:
    half, short, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for kinds in ((single,), (short,), (half,), (double,), (short, single, half), (single, double)):
        for p in NORM_TYPES:
            model = Weights(*kinds)
            filled = Loop(model, SGD(model.parameters(), lr=0.1), lambda m, step: m.fill(step, 0.01 * 10**step))
            yield from filled.by_function(clip_norm(p), 2)
        model = Weights(*kinds)
        loop = Loop(model, SGD(model.parameters(), lr=0.1), lambda m, step: m.fill(step))
        yield from loop.clipped(Clipper(model, BOUND), 2)


def extremes() -> Steps:
    """Norms near the ends of float32, and coefficients below its normal numbers."""
    for scale in (1e-30, 1e-18, 1e18, 1e30):
        for bound in (1e-12, 1e-30, 1e5):
            model = Weights(torch.float32)
            loop = Loop(model, SGD(model.parameters(), lr=0.1), partial(lambda s, m, step: m.fill(step, s), scale))
            yield from loop.clipped(Clipper(model, bound), 1)
            model = Weights(torch.float32)
            loop = Loop(model, adamw(model), partial(lambda s, m, step: m.fill(step, s), scale))
            yield from loop.stepped(Clipper(model, bound), 1)


def nonfinite() -> Steps:
    """Skipped, propagated and raised; by the functions as well."""
    spoilt = ((1, nan), (2, inf), (4, -inf))
    for what in ("skip", "propagate", "raise"):
        for make in (adamw, sgd):
            model = net()
            loop = Loop(model, make(model), backward, spoilt)
            clipper = Clipper(model, BOUND, nonfinite=what)
            for _ in loop.each(6):
                try:
                    fields = of_report(clipper.step(loop.optimizer))
                except distclip.NonFiniteError as error:
                    fields = {"error": type(error).__name__} | of_gradients(model)
                yield fields | of_model(model) | of_state(clipper)
    for value in (nan, inf):
        model = net()
        yield from Loop(model, sgd(model), backward, ((1, value),)).by_function(clip_norm(2.0), 3, finite=False)


def sparse() -> Steps:
    for make in (lambda m, c, loop: loop.stepped(c), lambda m, c, loop: loop.clipped(c)):
        model = net(sparse=True)
        yield from make(model, Clipper(model, BOUND), Loop(model, SGD(model.parameters(), lr=0.1), backward))
    model = net(sparse=True)
    yield from Loop(model, SGD(model.parameters(), lr=0.1), backward).by_function(clip_norm(2.0))


def scaled(make: Callable[[], nn.Module], gradients: Callable[..., None] = by_rank) -> Steps:
    """A GradScaler, and a step that is not finite in the middle."""
    for optimizer in (adamw, sgd):
        model = make()
        loop = Loop(model, optimizer(model), gradients, ((3, inf), (5, nan)))
        scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        yield from loop.stepped(Clipper(model, BOUND), 8, scaler=scaler)


@dataclass(frozen=True)
class Moody:
    """A policy that uses all of a Decision, and remembers."""

    def needs(self) -> tuple[()]:
        return ()

    def init(self, units: Units, device: torch.device) -> dict[str, Tensor]:
        return {"mean": torch.zeros((), dtype=torch.float64, device=device)}

    def decide(self, statistics: Statistics, state: dict[str, Tensor]) -> tuple[Decision, dict[str, Tensor]]:
        norm = statistics.norm()
        mean = torch.lerp(state["mean"], norm.nan_to_num(0.0, 0.0), 0.3)
        skip = (norm > 4 * mean) & (state["mean"] > 0)
        coef = (mean / norm).clamp(1e-6, 1.0)
        return Decision(mean, skip=skip, bounds=(-0.02, mean * 0.01 + 0.001), coef=coef), {"mean": mean}


def policies(make: Callable[[], nn.Module], gradients: Callable[..., None] = by_rank) -> Steps:
    chosen = (
        AutoClip(50, window=4),
        AutoClip(10, 100, max_norm=2.0),
        ValueClip(1e-2),
        ValueClip((-1e-3, 2e-2)),
        Moody(),
    )
    for policy in chosen:
        for optimizer in (adamw, sgd):
            model = make()
            loop = Loop(model, optimizer(model), gradients, ((2, nan),))
            clipper = Clipper(model, policy)
            yield from loop.stepped(clipper, 4)
            saved = clipper.state_dict()
            clipper = Clipper(model, policy)
            clipper.load_state_dict(saved)
            yield from loop.stepped(clipper, 3, start=4)


def attached(make: Callable[[], nn.Module], gradients: Callable[..., None] = by_rank) -> Steps:
    for optimizer in (adamw, sgd):
        model = make()
        loop = Loop(model, optimizer(model), gradients, ((3, nan),))
        yield from loop.attached(distclip.attach(loop.optimizer, model, BOUND))


def two_optimizers(make: Callable[[], nn.Module], gradients: Callable[..., None] = by_rank) -> Steps:
    """One that folds and one that does not, stepped by one call, and attached together."""
    for attach in (False, True):
        model = make()
        body, rest = list(model.blocks.parameters()), [*model.embed.parameters(), *model.head.parameters()]
        pair = AdamW(body, lr=1e-2, fused=True), SGD(rest, lr=1e-2)
        clipper = distclip.attach(pair, model, BOUND) if attach else Clipper(model, BOUND)
        for _ in Loop(model, sgd(model), gradients, ((3, inf),)).each(6):
            report = None if attach else clipper.step(*pair)
            for optimizer in pair if attach else ():
                optimizer.step()
            yield of_report(report or clipper.report) | of_model(model) | of_state(clipper)


def only_blocks() -> Steps:
    model = net()
    loop = Loop(model, adamw(model), backward)
    yield from loop.stepped(Clipper(model, 0.1, only=lambda name, _: name.startswith("blocks")))


# ---- many ranks -----------------------------------------------------------------------------------------------------


def stepped(make: Callable[[], nn.Module], gradients: Callable[..., None] = by_rank) -> Steps:
    """Steps of an optimizer that folds and of one that does not, one of them not finite; and ``clip_``."""
    for optimizer in (adamw, sgd):
        model = make()
        yield from Loop(model, optimizer(model), gradients, ((4, nan),)).stepped(Clipper(model, BOUND))
    model = make()
    yield from Loop(model, sgd(model), gradients).clipped(Clipper(model, BOUND))


def ddp(view: bool) -> nn.Module:
    return DistributedDataParallel(net(), gradient_as_bucket_view=view)


def fsdp1(orig: bool) -> nn.Module:
    return FullyShardedDataParallel(net(), use_orig_params=orig, device_id=torch.device("cpu"))


def fsdp1_function(orig: bool) -> Steps:
    for p in NORM_TYPES:
        model = fsdp1(orig)
        loop = Loop(model, sgd(model))
        yield from loop.by_function(lambda m, p=p: distclip.clip_grad_norm_(m, BOUND, p), 3)


def fsdp2() -> nn.Module:
    return sharded(net())


def fsdp2_narrow() -> nn.Module:
    return sharded(net(torch.bfloat16))


def fsdp2_mixed() -> nn.Module:
    return sharded(net(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def fsdp2_wide() -> nn.Module:
    return sharded(net(torch.float64))


def stages() -> Steps:
    """Each rank holds another part: said by ``split_over``, to a Clipper and to the function."""
    axes = [init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))["pp"]]
    for optimizer in (adamw, sgd):
        model = net(seed=dist.get_rank())
        yield from Loop(model, optimizer(model), by_rank, ((4, inf),)).stepped(Clipper(model, BOUND, split_over=axes))
    for p in NORM_TYPES:
        model = net(seed=dist.get_rank())
        yield from Loop(model, sgd(model), by_rank).by_function(clip_norm(p, split_over=axes))


def experts() -> Steps:
    """Blocks differ by rank, all else is copied: said by ``layout``, to a Clipper and to the function."""

    def layout(name: str, _: Tensor) -> Layout | None:
        return Layout(1) if "blocks" in name else None

    def make() -> nn.Module:
        torch.manual_seed(7 + dist.get_rank())
        mine = nn.ModuleList(Block() for _ in range(2))
        model = net()
        model.blocks = mine
        return model

    def gradients(model: nn.Module, step: int) -> None:
        by_rank(model, step)
        for p in (*model.embed.parameters(), *model.head.parameters()):
            dist.all_reduce(p.grad)

    for optimizer in (adamw, sgd):
        model = make()
        yield from Loop(model, optimizer(model), gradients).stepped(Clipper(model, BOUND, layout=layout))
    for p in NORM_TYPES:
        model = make()
        loop = Loop(model, sgd(model), gradients)
        yield from loop.by_function(lambda m, p=p: distclip.clip_grad_norm_(m, BOUND, p, layout=layout))


def tensor_parallel_only() -> nn.Module:
    return tensor_parallel(net(), init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))


def hsdp() -> nn.Module:
    return sharded(net(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def fsdp2_tp() -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tp"))
    return sharded(tensor_parallel(net(), mesh["tp"]), mesh["shard"])


def hsdp_tp() -> nn.Module:
    """Copied on two ranks and sharded over one, each over tensor parallel on two."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tp"))
    return sharded(tensor_parallel(net(), mesh["tp"]), mesh["replicate", "shard"])


def whole(model: nn.Module, step: int, **options: Any) -> None:
    """All ranks see the whole batch, as those of one tensor-parallel group must."""
    backward(model, step, **options)


def by_pair(model: nn.Module, step: int, **options: Any) -> None:
    """Ranks 0 and 1 see one half of the batch, 2 and 3 the other."""
    backward(model, step, dist.get_rank() // 2, 2, **options)


SCENARIOS: dict[int, dict[str, Callable[[], Steps]]] = {
    1: {
        "functions": partial(functions, net, backward),
        "norm types": partial(norm_types, net, backward),
        "dtypes": dtypes,
        "extremes": extremes,
        "non-finite": nonfinite,
        "sparse": sparse,
        "scaler": partial(scaled, net, backward),
        "policies": partial(policies, net, backward),
        "attached": partial(attached, net, backward),
        "two optimizers": partial(two_optimizers, net, backward),
        "only": only_blocks,
    },
    2: {
        "DDP": partial(stepped, partial(ddp, False)),
        "DDP, bucket views": partial(stepped, partial(ddp, True)),
        "DDP, functions": partial(functions, partial(ddp, True)),
        "DDP, scaler": partial(scaled, partial(ddp, False)),
        "FSDP1": partial(stepped, partial(fsdp1, True)),
        "FSDP1, flat": partial(stepped, partial(fsdp1, False)),
        "FSDP1, function": partial(fsdp1_function, True),
        "FSDP1, flat, function": partial(fsdp1_function, False),
        "FSDP2": partial(stepped, fsdp2),
        "FSDP2, norm types": partial(norm_types, fsdp2),
        "FSDP2, functions": partial(functions, fsdp2),
        "FSDP2, scaler": partial(scaled, fsdp2),
        "FSDP2, policies": partial(policies, fsdp2),
        "FSDP2, attached": partial(attached, fsdp2),
        "FSDP2, two optimizers": partial(two_optimizers, fsdp2),
        "FSDP2, bf16": partial(stepped, fsdp2_narrow),
        "FSDP2, bf16 beside fp32": partial(stepped, fsdp2_mixed),
        "FSDP2, fp64": partial(stepped, fsdp2_wide),
        "TP": partial(stepped, tensor_parallel_only, whole),
        "TP, functions": partial(functions, tensor_parallel_only, whole, NORMS),
        "stages": stages,
        "experts": experts,
    },
    4: {
        "HSDP": partial(stepped, hsdp),
        "FSDP2 x TP": partial(stepped, fsdp2_tp, by_pair),
        "FSDP2 x TP, norm types": partial(norm_types, fsdp2_tp, by_pair),
        "HSDP x TP": partial(stepped, hsdp_tp, by_pair),
        "HSDP x TP, functions": partial(functions, hsdp_tp, by_pair, NORMS),
        "HSDP x TP, policies": partial(policies, hsdp_tp, by_pair),
    },
}


# ---- recording ------------------------------------------------------------------------------------------------------


def on_rank(rank: int, size: int, folder: str) -> None:
    """All scenarios of ``size`` ranks, in order."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if size > 1:
        store = dist.FileStore(f"{folder}/{size}", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    found = {name: list(steps()) for name, steps in SCENARIOS[size].items()}
    Path(folder, f"{size}-{rank}.json").write_text(json.dumps({"compiled": is_compiled(), "found": found}))
    if size > 1:
        dist.destroy_process_group()


def is_compiled() -> bool:
    """Whether this process has loaded a library that lies in distclip's folder."""
    home = str(Path(distclip.__file__).parent)
    return any(home in line and ".so" in line for line in Path("/proc/self/maps").read_text().splitlines())


def record_one_kernel() -> Noted:
    """Scenario -> step -> rank -> what it noted, with the kernel that the environment allows."""
    scenarios: dict[str, Any] = {}
    compiled = set()
    mp.get_context("forkserver").set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel"])
    with tempfile.TemporaryDirectory() as folder:
        for size in SCENARIOS:
            mp.start_processes(on_rank, (size, folder), nprocs=size, start_method="forkserver")
            ranks = [json.loads(Path(folder, f"{size}-{rank}.json").read_text()) for rank in range(size)]
            compiled.update(rank["compiled"] for rank in ranks)
            for name in SCENARIOS[size]:
                scenarios[name] = [list(step) for step in zip(*(rank["found"][name] for rank in ranks), strict=True)]
    return {"compiled kernel": sorted(compiled), "scenarios": scenarios}


def record() -> Noted:
    """Once with the compiled kernel and once without it, each in a process of its own."""
    passes = {}
    for name, extra in (("compiled", {}), ("DISTCLIP_NATIVE=0", {"DISTCLIP_NATIVE": "0"})):
        surroundings = {key: value for key, value in os.environ.items() if key != "DISTCLIP_NATIVE"}
        surroundings |= {"OMP_NUM_THREADS": "1"} | extra
        with tempfile.NamedTemporaryFile() as file:
            subprocess.run([sys.executable, __file__, "pass", file.name], env=surroundings, check=True)
            passes[name] = json.loads(Path(file.name).read_text())
    cpu = torch.backends.cpu.get_cpu_capability()
    where = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(), "cpu": cpu}
    return {"where": where, "passes": passes}


# ---- comparing ------------------------------------------------------------------------------------------------------


def flat(recorded: Noted) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """((pass, scenario, step, rank, field), value)."""
    for name, each in recorded["passes"].items():
        yield (name, "compiled kernel", 0, 0, "loaded"), each["compiled kernel"]
        for scenario, steps in each["scenarios"].items():
            for step, ranks in enumerate(steps):
                for rank, fields in enumerate(ranks):
                    for field, value in fields.items():
                        yield (name, scenario, step, rank, field), value


def differences(before: Noted, after: Noted) -> dict[tuple[Any, ...], tuple[Any, Any]]:
    old, new = dict(flat(before)), dict(flat(after))
    return {key: (old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}


def by_scenario(found: dict[tuple[Any, ...], tuple[Any, Any]]) -> Iterator[str]:
    """A line a scenario: how many of its steps differ, and the fields of the first one on its lowest rank."""
    scenarios = dict.fromkeys(key[:2] for key in found)
    for name, scenario in scenarios:
        places = sorted({key[2:4] for key in found if key[:2] == (name, scenario)})
        step, rank = first = places[0]
        fields = [
            f"{key[4]} {shortened(old)} -> {shortened(new)}"
            for key, (old, new) in found.items()
            if key[:4] == (name, scenario, *first)
        ]
        count = len({step for step, _ in places})
        yield f"{name} | {scenario} | {count} steps, first {step} on rank {rank}: {', '.join(fields)}"


def shortened(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def summary(recorded: Noted) -> str:
    """How many steps, and what they did: a record in which nothing is clipped shows nothing."""
    lines = []
    for name, each in recorded["passes"].items():
        steps = [ranks[0] for scenario in each["scenarios"].values() for ranks in scenario]
        reports = [step for step in steps if "coef" in step]
        whole = sum(step["coef"].endswith(f" {(1.0).hex()}") for step in reports)
        skipped = sum(step["skip"].endswith("True") for step in reports)
        lines.append(
            f"{name}: kernel loaded {each['compiled kernel']}, {len(each['scenarios'])} scenarios, {len(steps)} steps, "
            f"{len(reports)} with a report: {len(reports) - whole} clipped, {skipped} skipped"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="record the bits of many steps, or compare them with a record")
    parser.add_argument("what", choices=("record", "compare", "pass"), help="pass: one kernel's, of this environment")
    parser.add_argument("file", type=Path)
    given = parser.parse_args(arguments)
    if given.what == "pass":
        given.file.write_text(json.dumps(record_one_kernel()))
        return 0
    now = record()
    print(f"{Path(distclip.__file__).parent}\n{summary(now)}")
    if given.what == "record":
        given.file.write_text(json.dumps(now, indent=0))
        return 0
    before = json.loads(given.file.read_text())
    if before["where"] != now["where"]:
        print(f"recorded elsewhere, which may change bits by itself: {before['where']}, here {now['where']}")
    found = differences(before, now)
    if found:
        print(*by_scenario(found), sep="\n")
        return 1
    print("the same bits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
