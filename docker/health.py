"""Whether this container can train: clips a small model and checks the norm.

On the CPU, even with GPUs: the check must not take memory from the job.
"""

import sys

import torch

import distclip

model = torch.nn.Linear(3, 1)
model(torch.tensor([[2.0, 4.0, 4.0]])).sum().backward()  # the gradients: 2, 4, 4 and, of the bias, 1
before = distclip.clip_grad_norm_(model.parameters(), 1.0).item()
after = sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None) ** 0.5
sound = abs(before - 37**0.5) < 1e-5 and abs(after - 1) < 1e-5
print(f"norm {before:.6f} clipped to {after:.6f}: {'sound' if sound else 'WRONG'}")
sys.exit(not sound)
