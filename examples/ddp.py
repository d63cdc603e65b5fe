"""DDP with an adaptive bound: torchrun --nproc-per-node 2 examples/ddp.py"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import distclip

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
clipper = distclip.Clipper(model, distclip.AutoClip(percentile=10, max_norm=1.0), max_consecutive_skips=5)

torch.manual_seed(dist.get_rank())  # different rows on every rank
for step in range(30):
    x = torch.randn(16, 8)
    if step == 10 and dist.get_rank() == 1:
        x[0, 0] = torch.nan  # one bad row on one rank: all ranks skip this step
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    report = clipper.step(optimizer)
    optimizer.zero_grad()
    if dist.get_rank() == 0 and (step % 10 == 0 or report.skip):
        print(step, report.to_dict(), report.culprit or "")

assert all(p.isfinite().all() for p in model.parameters())
dist.destroy_process_group()
