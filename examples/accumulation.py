"""Four backwards, one norm, one step, under DDP: torchrun --nproc-per-node 2 examples/accumulation.py"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import distclip

PARTS = 4
dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
clipper = distclip.Clipper(model, 1.0)


def loss_of(x):
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


torch.manual_seed(dist.get_rank())  # different rows on every rank
for step in range(20):
    x = torch.randn(32, 8)
    loss_of(x).backward()  # for comparison: all rows at once
    at_once = clipper.measure().norm.item()
    optimizer.zero_grad()
    for k, part in enumerate(x.chunk(PARTS)):
        with nullcontext() if k == PARTS - 1 else model.no_sync():  # ranks communicate in the last backward alone
            (loss_of(part) / PARTS).backward()  # a mean of means: the bound keeps its meaning for any PARTS
    report = clipper.step(optimizer)  # only now: gradients of a part are neither whole nor the same on all ranks
    optimizer.zero_grad()
    assert abs(report.norm.item() / at_once - 1) < 1e-5
    if dist.get_rank() == 0 and step % 5 == 0:
        print(f"step {step:2}: norm {report.norm:.4f}, all rows at once {at_once:.4f}, scaled by {report.coef:.4f}")

dist.destroy_process_group()
