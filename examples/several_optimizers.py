"""Muon and AdamW, one norm, one decision: torchrun --nproc-per-node 2 examples/several_optimizers.py"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import distclip

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)))
muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2)
adamw = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=1e-2, fused=True)
clipper = distclip.Clipper(model, 1.0, watch={"of Muon": "*weight", "of AdamW": "*bias"})

torch.manual_seed(dist.get_rank())  # different rows on every rank
for step in range(20):
    x = torch.randn(16, 8)
    if step == 7 and dist.get_rank() == 1:
        x[0, 0] = torch.nan  # one bad row on one rank: neither optimizer steps, on neither rank
    (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
    report = clipper.step(muon, adamw)  # a bound for each would turn the gradient: one factor keeps its direction
    muon.zero_grad()
    adamw.zero_grad()
    if dist.get_rank() == 0 and (step % 5 == 0 or report.skip):
        parts = ", ".join(f"{norm:.3f} {name}" for name, norm in report.norms.items())
        done = "skipped" if report.skip else f"x {report.coef:.3f}"
        print(f"step {step:2}: norm {report.norm:.3f} = {parts}; {done}")

assert clipper.history.skipped == 1
assert all(p.isfinite().all() for p in model.parameters())
dist.destroy_process_group()
