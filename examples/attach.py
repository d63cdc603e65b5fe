"""An unchanged loop: two optimizers, FSDP2, one norm. torchrun --nproc-per-node 2 examples/attach.py"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distclip

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
matrices = torch.optim.SGD([p for p in model.parameters() if p.ndim == 2], lr=1e-2, momentum=0.9)
others = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=1e-2)
clipper = distclip.attach([matrices, others], model, 1.0)

torch.manual_seed(dist.get_rank())  # different rows on every rank
for step in range(20):
    x = torch.randn(16, 8)
    (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
    matrices.step()  # clips the gradients of both by their common norm
    others.step()
    matrices.zero_grad()
    others.zero_grad()
    if dist.get_rank() == 0 and step % 5 == 0:
        print(step, clipper.report.to_dict())

dist.destroy_process_group()
