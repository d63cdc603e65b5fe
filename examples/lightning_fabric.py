"""A loop with Fabric, FSDP2 on two ranks: torchrun --nproc-per-node 2 examples/lightning_fabric.py"""

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from distclip.integrations.lightning import FabricClipper


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(model, mesh=mesh["data_parallel"])


strategy = ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1)
fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
fabric.launch()
fabric.seed_everything(0)
model = fabric.setup(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)))
optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))
clipper = FabricClipper(fabric, model, 1.0)

torch.manual_seed(fabric.global_rank)  # different rows on every rank
for step in range(20):
    x = torch.randn(16, 8)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    fabric.backward(loss)
    report = clipper.step(optimizer)  # in place of fabric.clip_gradients and optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0 and fabric.is_global_zero:
        print(step, report.to_dict())

fabric.save("fabric.ckpt", {"model": model, "optimizer": optimizer, "clipper": clipper.state_dict()})
