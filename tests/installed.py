"""Is the installed distclip whole? `python tests/installed.py compiled`, or `torch` where it has no compiled kernel."""

import sys
from pathlib import Path

import torch

import distclip
from distclip.kernels import native

assert Path(distclip.__file__).is_relative_to(sys.prefix), f"{distclip.__file__} is not installed"
assert native.name().startswith(sys.argv[1]), f"sums of squares on the CPU: {native.name()}"

gradients = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)).split([1_000_000, 7, 1_999_993])
parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
for parameter, gradient in zip(parameters, gradients, strict=True):
    parameter.grad = gradient.clone()
expected = sum(g.double().square().sum() for g in gradients).sqrt().item()
norm = distclip.clip_grad_norm_(parameters, 1.0).item()
assert abs(norm / expected - 1) < 2e-7, (norm, expected)
print(f"distclip {distclip.__version__}, {native.name()}, torch {torch.__version__}: norm {norm:.4f} is right")
