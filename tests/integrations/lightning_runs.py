"""What the ranks of test_lightning.py run: one module, and fits of it under every strategy, by the dictionary."""

import csv
import logging
import os
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import inf, nan
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision
from lightning.fabric.strategies import (
    DDPStrategy as FabricDDP,
    FSDPStrategy as FabricFSDP,
    ModelParallelStrategy as FabricModelParallel,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.amp.grad_scaler import GradScaler
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import distclip
from distclip import AutoClip, Decision, MaxNorm, ValueClip
from distclip.integrations.lightning import ClipGradients, FabricClipper
from support.layouts import ROWS, batch, build
from support.own_policy import OwnRunningMean

STEPS = 12
BOUND = 1.25  # between the norms of the run


@dataclass(frozen=True)
class SkipThird:
    """Clips, and skips every third step for a reason of its own."""

    def needs(self):
        return ()

    def init(self, units, device):
        return {"steps": torch.zeros((), dtype=torch.int64, device=device)}

    def decide(self, statistics, state):
        bound = torch.full_like(statistics.norm(), BOUND)
        return Decision(bound, skip=state["steps"] % 3 == 2), {"steps": state["steps"] + 1}


POLICIES = {
    "max_norm": MaxNorm(BOUND),
    "autoclip": AutoClip(50),
    "by_unit": OwnRunningMean(),
    "value": ValueClip(0.05),
    "skip_third": SkipThird(),
    "none": MaxNorm(inf),
}


@dataclass(frozen=True)
class Case:
    """One fit. ``bad``: the batch whose loss is NaN on the last rank; ``corrupt``: its gradients, after reduction."""

    layout: str = "ddp"
    policy: str = "max_norm"
    optimizer: str = "adamw"
    accumulate: int = 1
    bad: int | None = None
    corrupt: int | None = None
    manual: bool = False
    validate: bool = False
    precision: str = "32-true"
    scaled: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)


def optimizer_of(name, parameters):
    if name == "sgd":
        return SGD(parameters, lr=0.05, momentum=0.9)
    return AdamW(parameters, lr=1e-3, eps=1e-4, fused=name == "fused")


def rows(batches=STEPS):
    words, targets = zip(*map(batch, range(batches)), strict=True)
    return TensorDataset(torch.cat(words), torch.cat(targets))


class Lit(LightningModule):
    def __init__(self, case=Case()):
        super().__init__()
        self.net, self.case = build(), case
        self.automatic_optimization = not case.manual

    def configure_model(self):
        if self.case.layout in ("fsdp2", "tp", "fsdp2_tp") and not isinstance(self.net.head.weight, DTensor):
            shard(self.net, self.device_mesh, self.case.layout)

    def loss(self, rows, batch_idx):
        loss = (self.net(rows[0]) - rows[1]).square().mean()
        last = self.trainer.world_size - 1
        return loss * nan if batch_idx == self.case.bad and self.global_rank == last else loss

    def training_step(self, rows, batch_idx):
        loss = self.loss(rows, batch_idx)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()
        return None

    def on_after_backward(self):
        if self.trainer.global_step == self.case.corrupt and self.global_rank == self.trainer.world_size - 1:
            self.net.head.weight.grad[0, 0] = nan

    def validation_step(self, rows, batch_idx):
        self.log("loss", self.loss(rows, None))

    def configure_optimizers(self):
        optimizer = optimizer_of(self.case.optimizer, self.parameters())
        return [optimizer], [{"scheduler": StepLR(optimizer, 4, 0.5), "interval": "step"}]


def shard(net, mesh, layout):
    data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
    if layout in ("tp", "fsdp2_tp"):
        for block in net.blocks:
            parallelize_module(block, tensor, {"1": ColwiseParallel(), "3": RowwiseParallel()})
    if layout in ("fsdp2", "fsdp2_tp"):
        for block in net.blocks:
            fully_shard(block, mesh=data)
        fully_shard(net, mesh=data)
    return net


def wrapped(model, device_id=torch.device("cpu"), **options):  # noqa: B008
    return FullyShardedDataParallel(model, device_id=device_id, use_orig_params=True, **options)


class CpuFSDP(FSDPStrategy):
    """Lightning refuses its own class on the CPU, where the index of the device that it passes on is None."""

    def _setup_model(self, model):
        model.net.blocks[0] = wrapped(model.net.blocks[0])
        return wrapped(model)


class CpuFabricFSDP(FabricFSDP):
    def setup_module(self, module):
        return wrapped(module)


class Scaled(MixedPrecision):
    """A GradScaler around float32."""

    forward_context = staticmethod(nullcontext)


class FabricScaled(FabricMixedPrecision):
    forward_context = staticmethod(nullcontext)

    def convert_input(self, data):
        return data


def strategy(layout):
    size = dist.get_world_size() if dist.is_initialized() else 1
    if layout.startswith("ddp"):
        unused = layout == "ddp_unused"
        return DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True, find_unused_parameters=unused)
    if layout == "fsdp1":
        return CpuFSDP(process_group_backend="gloo", state_dict_type="sharded")  # "full" kills torch on the CPU
    if layout in ("fsdp2", "tp", "fsdp2_tp"):
        tensor = {"fsdp2": 1, "tp": size, "fsdp2_tp": 2}[layout]
        return ModelParallelStrategy(size // tensor, tensor, save_distributed_checkpoint=False)
    return "auto"


class Seen(Callback):
    """What ClipGradients did at every step, and the whole parameters at the end."""

    def __init__(self, clip):
        self.clip, self.reports = clip, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.reports.append(self.clip.clipper.report.to_dict())

    def on_train_end(self, trainer, pl_module):
        self.rates = [config.scheduler.get_last_lr()[0] for config in trainer.lr_scheduler_configs]
        root = trainer.strategy.model
        whole = FullyShardedDataParallel.summon_full_params(root) if fsdp1(root) else nullcontext()
        with whole:
            parameters = list(pl_module.net.parameters())
            parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
            self.parameters = [p.detach().clone() for p in parameters]


def fsdp1(root):
    return isinstance(root, FullyShardedDataParallel)


class Kept(Logger):
    """Keeps what is logged."""

    name, version = "kept", 0

    def __init__(self):
        super().__init__()
        self.metrics = []

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


def quiet():
    """Lightning says much about CPUs, workers and checkpoints."""
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if dist.is_initialized():
        os.environ["LOCAL_RANK"] = str(dist.get_rank())


def trainer_of(case, callbacks=(), **settings):
    size = dist.get_world_size() if dist.is_initialized() and case.layout != "single" else 1
    settings = {"max_epochs": 1, "logger": False, **settings, **case.trainer}
    plugins = [Scaled("16-mixed", "cpu", GradScaler("cpu", init_scale=1024.0))] if case.scaled else None
    return Trainer(
        accelerator="cpu",
        devices=size,
        strategy=strategy(case.layout),
        callbacks=list(callbacks),
        accumulate_grad_batches=case.accumulate,
        plugins=plugins,
        precision=None if case.scaled else case.precision,
        num_sanity_val_steps=2 if case.validate else 0,
        val_check_interval=3 if case.validate else None,
        use_distributed_sampler=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def loader(case, batches=None):
    """Deals the rows of every global batch out to the ranks. (Lightning's own sampler would shuffle them.)"""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    parts = {"single": 1, "tp": 1, "fsdp2_tp": size // 2}.get(case.layout, size)
    per_step = 2 if case.manual else case.accumulate
    data = rows(batches or STEPS * per_step)
    sampler = DistributedSampler(data, parts, rank * parts // size, shuffle=False)
    return DataLoader(data, batch_size=ROWS // parts, sampler=sampler)


def fit(case, module=None, clip=None, ckpt=None, saves=None, **settings):
    """Fit once; the reports, parameters, and what else is to be compared."""
    clip = clip or ClipGradients(POLICIES[case.policy], **case.options)
    seen = Seen(clip)
    trainer = trainer_of(case, [clip, seen, *([saves] if saves else [])], **settings)
    trainer.fit(module or Lit(case), loader(case), loader(case, 1) if case.validate else None, ckpt_path=ckpt)
    scale = trainer.scaler.get_scale() if trainer.scaler is not None else None
    return {
        "norms": [r["norm"] for r in seen.reports],
        "coefs": [r["coef"] for r in seen.reports],
        "skips": [r["skip"] for r in seen.reports],
        "parameters": seen.parameters,
        "global_step": trainer.global_step,
        "rate": seen.rates[0],
        "scale": scale,
        "state": clip.state_dict(),
        "logged": [entry for logger in trainer.loggers for entry in getattr(logger, "metrics", [])],
        "trainer": trainer,
        "clip": clip,
    }


def portable(result):
    return {key: value for key, value in result.items() if key not in ("trainer", "clip")}


def fits(cases):
    quiet()
    return [portable(fit(case)) for case in cases]


def alone(case, scheduled=True):
    """One process, clipped by definition for MaxNorm and ValueClip, by distclip.Clipper for the others."""
    net = build()
    optimizer = optimizer_of(case.optimizer.replace("fused", "adamw"), net.parameters())
    scheduler = StepLR(optimizer, 4, 0.5)
    clipper = distclip.Clipper(net, POLICIES[case.policy])
    per_step = 2 if case.manual else case.accumulate
    norms, skips = [], []
    for step in range(STEPS):
        for micro in range(step * per_step, (step + 1) * per_step):
            words, targets = batch(micro)
            loss = (net(words) - targets).square().mean() / per_step
            (loss * nan if micro in (case.bad, case.corrupt) else loss).backward()
        norm = torch.cat([p.grad.flatten().double() for p in net.parameters()]).norm().item()
        skip = not norm < inf
        if case.policy in ("max_norm", "value"):
            for p in net.parameters():
                if case.policy == "max_norm":
                    p.grad.mul_(min(1.0, BOUND / (norm + 1e-6)))
                else:
                    p.grad.clamp_(-0.05, 0.05)
        else:
            skip = bool(clipper.clip_().skip)
        if not skip:
            optimizer.step()
        if scheduled and not case.manual:
            scheduler.step()
        optimizer.zero_grad()
        norms.append(norm)
        skips.append(skip)
    return norms, skips, [p.detach() for p in net.parameters()], scheduler.get_last_lr()[0]


# ---- resume, fit again, log ----------------------------------------------------------------------------------


def resume(layout, policy, folder):
    """Two epochs in one go, and with a checkpoint between them, in all of its own objects."""
    quiet()
    case, epoch = Case(layout, policy, bad=3), {"limit_train_batches": STEPS // 2}
    whole = fit(case, max_epochs=2, **epoch)
    saves = ModelCheckpoint(Path(folder) / f"{layout}-{policy}", save_last=True, save_on_train_epoch_end=True)
    first = fit(case, saves=saves, **epoch)
    second = fit(case, ckpt=saves.last_model_path, max_epochs=2, **epoch)
    return portable(whole), portable(first), portable(second)


def fit_again(layout):
    """Two fits with one callback on one trainer: the norms of both, and the state at the end."""
    quiet()
    case, clip, module = Case(layout, "autoclip"), ClipGradients(POLICIES["autoclip"]), Lit(Case(layout))
    first = fit(case, module, clip, limit_train_batches=STEPS // 2)
    trainer, seen = first["trainer"], Seen(clip)
    trainer.callbacks.append(seen)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(case))
    return first["norms"] + [r["norm"] for r in seen.reports], clip.state_dict()


def log(folder):
    """What loggers get every 4 steps, the same in a file, and every step under accumulation."""
    quiet()
    kept, file = Kept(), CSVLogger(folder)
    few = fit(Case(bad=5), logger=[kept, file], log_every_n_steps=4)
    table = []
    if few["trainer"].is_global_zero:
        with open(Path(file.log_dir) / "metrics.csv", newline="") as stream:
            table = list(csv.DictReader(stream))
    every = fit(Case(accumulate=2), logger=Kept(), log_every_n_steps=1)
    return portable(few), table, portable(every)


def alone_among_ranks():
    """One process of a group trains by itself: the error, and the norms once it says so."""
    quiet()
    try:
        fit(Case("single"))
    except ValueError as error:
        mine = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
        return str(error), fit(Case("single", options={"group": mine}))["norms"]


class TwoNets(Lit):
    """Two networks trained by turns, each clipped by its own norm; the norms of each, in ``seen``."""

    def __init__(self, case):
        super().__init__(case)
        self.other, self.seen = build(), ([], [])

    def configure_optimizers(self):
        return [SGD(net.parameters(), lr=0.05) for net in (self.net, self.other)]

    def on_train_start(self):
        nets = zip(self.trainer.optimizers, (self.net, self.other), strict=True)
        self.clippers = [distclip.attach(optimizer, net, BOUND) for optimizer, net in nets]

    def training_step(self, rows, batch_idx):
        for optimizer, net, clipper, seen in zip(
            self.optimizers(), (self.net, self.other), self.clippers, self.seen, strict=True
        ):
            self.toggle_optimizer(optimizer)
            self.manual_backward((net(rows[0]) - rows[1]).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)
            seen.append(clipper.report.norm.item())


def two_optimizers():
    """The error of ClipGradients, and what it recommends."""
    quiet()
    case = Case("ddp_unused", manual=True, trainer={"limit_train_batches": STEPS})
    try:
        fit(case, TwoNets(case))
    except ValueError as error:
        module = TwoNets(case)
        trainer_of(case).fit(module, loader(case))
        return str(error), module.seen


# ---- Fabric --------------------------------------------------------------------------------------------------


class After:
    """Counts what Fabric tells its callbacks."""

    def __init__(self):
        self.steps = 0

    def on_after_optimizer_step(self, strategy, optimizer):
        self.steps += 1


def fabric_fit(case, folder=None):
    size, after = dist.get_world_size() if dist.is_initialized() else 1, After()
    strategies = {
        "ddp": lambda: FabricDDP(process_group_backend="gloo"),
        "fsdp1": lambda: CpuFabricFSDP(process_group_backend="gloo"),
        "fsdp2": lambda: FabricModelParallel(lambda net, mesh: shard(net, mesh, "fsdp2"), size, 1),
        "single": lambda: "auto",
    }
    plugins = [FabricScaled("16-mixed", "cpu", GradScaler("cpu", init_scale=1024.0))] if case.scaled else None
    fabric = Fabric(
        accelerator="cpu", strategy=strategies[case.layout](), devices=size, plugins=plugins, callbacks=[after]
    )
    fabric.launch()
    model = fabric.setup(build())
    optimizer = fabric.setup_optimizers(optimizer_of(case.optimizer, model.parameters()))
    clipper = FabricClipper(fabric, model, POLICIES[case.policy], **case.options)
    reports = []
    for step in range(STEPS):
        if folder is not None and step == 6:
            state = {"model": model, "optimizer": optimizer, "clipper": clipper.state_dict()}
            fabric.save(f"{folder}/{case.layout}", state)
            clipper = FabricClipper(fabric, model, POLICIES[case.policy])
            state["clipper"] = None
            fabric.load(f"{folder}/{case.layout}", state)
            clipper.load_state_dict(state["clipper"])
        for micro in range(case.accumulate):
            words, targets = batch(step * case.accumulate + micro)
            mine = slice(fabric.global_rank * ROWS // size, (fabric.global_rank + 1) * ROWS // size)
            with fabric.no_backward_sync(model, enabled=micro + 1 < case.accumulate):
                loss = (model(words[mine]) - targets[mine]).square().mean() / case.accumulate
                bad = step * case.accumulate + micro == case.bad and fabric.global_rank == size - 1
                fabric.backward(loss * nan if bad else loss)
        reports.append(clipper.step(optimizer).to_dict())
        optimizer.zero_grad()
    root = model._forward_module
    with FullyShardedDataParallel.summon_full_params(root) if fsdp1(root) else nullcontext():
        parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.module.parameters()]
        parameters = [p.detach().clone() for p in parameters]
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    return {
        "norms": [r["norm"] for r in reports],
        "coefs": [r["coef"] for r in reports],
        "skips": [r["skip"] for r in reports],
        "parameters": parameters,
        "after": after.steps,
        "scale": None if scaler is None else scaler.get_scale(),
        "state": clipper.state_dict(),
    }


def fabric_fits(cases, folder):
    quiet()
    return [fabric_fit(case) for case in cases], [fabric_fit(case, folder) for case in cases[:4]]


# ---- many in one launch --------------------------------------------------------------------------------------


def calls(*functions):
    """What each of (function, arguments) returns: ranks start once for all of them."""
    return [function(*arguments) for function, *arguments in functions]
