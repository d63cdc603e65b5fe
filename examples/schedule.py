"""A bound that falls as training settles, beside the norms that it meets: python examples/schedule.py"""

import torch

import distclip

STEPS, WIDEST = 60, 24.0
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
clipper = distclip.Clipper(model, distclip.MaxNorm(distclip.Cosine(WIDEST, 2.0, steps=STEPS)))  # or Warmup, or a lambda


def bar(norm, bound):
    """`#` is the gradient that is applied, `.` what is cut off, `|` the bound."""
    kept, cut, end = (int(length * 60 / WIDEST) for length in (min(norm, bound), max(norm - bound, 0), bound))
    return f"{'#' * kept:{end}}|{'.' * cut}"


clipped = 0
for step in range(STEPS):
    x = torch.randn(64, 8)
    (model(x) - 2 * x.sum(1, keepdim=True)).square().mean().backward()
    report = clipper.step(optimizer)
    optimizer.zero_grad()
    clipped += bool(report.coef < 1)
    if step % 3 == 0:
        norm, bound = report.norm.item(), report.max_norm.item()
        print(f"step {step:2} bound {bound:5.2f} norm {norm:5.2f} {bar(norm, bound)}")

print(f"clipped: {clipped} of {STEPS} steps; clipper.state_dict() knows the step, so a resume goes on with its bound")
assert 0 < clipped < STEPS / 2
