"""Distributing a model over the ranks of a job, as the `parallel` section says."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from distclip import Clipper
from distclip.step.options import Options
from distclip.train.axes import Axes, data_mesh
from distclip.train.clip import options_of, signals_of
from distclip.train.config import Config
from distclip.train.held import Held, Holder
from distclip.train.models.gpt import Gpt
from distclip.train.optim import build_optimizer
from distclip.train.passes import Passes, Whole
from distclip.train.place import Place
from distclip.train.ways.data import autocast, copy_by_ddp, shard_by_fsdp2
from distclip.train.ways.experts import keep_experts, layout_of_experts, shard_experts
from distclip.train.ways.tensor import cut_layers
from distclip.train.ways.zero import Zero


def spread(model: nn.Module, config: Config, axes: Axes, place: Place) -> tuple[Passes, Holder]:
    """This rank's part of `model`, which every rank has built whole and identical. All ranks call."""
    if config.parallel.strategy.startswith("zero"):
        zero = Zero.of(model.to(place.device), config, place)
        return zero, zero
    mesh = axes.mesh(place.device.type)
    model, options = cut(model.to(place.device), axes, mesh, config)
    model = share(model, axes, mesh, config, place.device)
    held = Held(
        model=model,
        optimizer=build_optimizer(config.optim, model),
        clipper=Clipper(model, config.clip.policy, **options),
        signals=signals_of(config.clip),
        stages=axes.pipeline,
    )
    if axes.pipeline == 1:
        return Whole(model=model), held
    from distclip.train.ways.pipeline import Piped  # torch.distributed.pipelining imports torch._dynamo: 0.6 s

    microbatches = config.parallel.microbatches or axes.pipeline
    return Piped.of(model, mesh.get_group("pp"), place.device, config.parallel.schedule, microbatches), held


def cut(model: nn.Module, axes: Axes, mesh: DeviceMesh, config: Config) -> tuple[nn.Module, Options]:
    """What this rank keeps along the axes where ranks hold different layers, and the options of its Clipper."""
    options = options_of(config.clip)
    if axes.pipeline == axes.tensor == axes.expert == 1:
        return model, options
    assert isinstance(model, Gpt)  # checked by Config
    if axes.pipeline > 1:
        model.keep_stage(mesh.get_local_rank("pp"), axes.pipeline)
        options["split_over"] = [mesh["pp"]]
    if axes.tensor > 1:
        cut_layers(model, mesh["tp"])
    if axes.expert > 1:
        experts = axes.expert_mesh(mesh.device_type)
        keep_experts(model, experts["ep"])
        shard_experts(model, data_mesh(experts, "edp"), axes.data_size, low_precision(config))
        options["layout"] = layout_of_experts(axes.replicate)
    return model, options


def share(model: nn.Module, axes: Axes, mesh: DeviceMesh, config: Config, device: torch.device) -> nn.Module:
    """The model as the ranks of the data-parallel axis hold it."""
    parallel, dtype = config.parallel, low_precision(config)
    if parallel.strategy == "fsdp2" or parallel.copies_by_fsdp2:
        shard_by_fsdp2(model, data_mesh(mesh), dtype)
        return model
    if dtype is not None:
        autocast(model, device, dtype)
    return copy_by_ddp(model, mesh["dp"], device) if parallel.strategy == "ddp" else model


def low_precision(config: Config) -> torch.dtype | None:
    return torch.bfloat16 if config.train.precision == "bf16" else None
