"""Models as users hand them to `distclip doctor --model doctor.mine:...`, and some that go wrong on rank 1."""

import os
import signal
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip


def layers(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, 3))


def backward_of(model: nn.Module):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    return lambda: model(x).square().mean().backward()


def sharded():
    model, mesh = layers(), init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    fused, slow = torch.optim.AdamW(model[0].parameters(), fused=True), torch.optim.SGD(model[2].parameters(), 0.1)
    return model, (fused, slow), backward_of(model)


def stages():
    """Two stages without a schedule: each has its own loss."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("pp",))
    part = nn.Sequential(layers()[2 * dist.get_rank()])
    x = torch.ones(2, part[0].in_features)
    clipper = distclip.Clipper(part, distclip.AutoClip(), split_over=[mesh["pp"]], watch="parameters")
    return clipper, lambda: part(x).square().sum().backward()


def without_backward():
    return layers()


def unreduced():
    """Replicas whose gradients nobody reduces."""
    model = layers()
    return model, backward_of(model)


def another_on_rank_1():
    return layers(width=8 + dist.get_rank())


def another_ddp_on_rank_1():
    return DistributedDataParallel(layers(width=8 + dist.get_rank()))


def dies_on_rank_1():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return layers()


def hangs_on_rank_1():
    if dist.get_rank() == 1:
        time.sleep(1000)
    return layers()


def raises_on_rank_1():
    model = layers()

    def backward():
        if dist.get_rank() == 1:
            raise KeyError("batch")
        model(torch.ones(1, 4)).sum().backward()

    return model, backward


def a_number():
    return 3


nothing = None
