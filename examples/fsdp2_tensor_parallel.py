"""FSDP2 over tensor parallel: torchrun --nproc-per-node 4 examples/fsdp2_tensor_parallel.py"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distclip

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
parallelize_module(model, mesh["tp"], {"1": ColwiseParallel(), "3": RowwiseParallel()})
fully_shard(model, mesh=mesh["dp"])  # the norm layer lies on (dp), the linears on (dp, tp): torch's clipping raises
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
clipper = distclip.Clipper(model, 1.0)

torch.manual_seed(mesh["dp"].get_local_rank())  # the ranks of one tensor-parallel group see the same rows
for step in range(10):
    x = torch.randn(16, 8)
    (model(x) - x.flip(1)).square().sum().backward()
    if step == 0:
        clipper.verify()  # every element counts once, replicas agree
    report = clipper.step(optimizer)
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(step, report.to_dict())

dist.destroy_process_group()
