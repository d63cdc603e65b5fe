"""Accelerate with an adaptive bound and a bad row: torchrun --nproc-per-node 2 examples/accelerate_ddp.py"""

import torch

import distclip
from distclip.integrations.accelerate import Accelerator  # was: from accelerate import Accelerator

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
x = torch.randn(1280, 8)
x[700] = torch.nan  # only one rank gets it: both skip that step
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
clipper = accelerator.clipper(model, distclip.AutoClip(percentile=10, max_norm=1.0))  # save_state() saves it

skipped = 0
for step, (inputs, targets) in enumerate(data):
    with accelerator.accumulate(model):
        accelerator.backward((model(inputs) - targets).square().mean())
        if accelerator.sync_gradients:
            report = clipper.clip_()
            skipped += bool(report.skip)
            if report.skip or step % 10 == 9:
                accelerator.print(step, report.to_dict(), report.culprit or "")
        optimizer.step()
        optimizer.zero_grad()

assert skipped == 1
assert all(p.isfinite().all() for p in model.parameters())
accelerator.end_training()
