"""A policy of your own: a bound of twice the median of the last norms. python examples/own_policy.py"""

from dataclasses import dataclass

import torch

import distclip


@dataclass(frozen=True)
class TwiceTheMedian:
    window: int = 15

    def needs(self):
        return ()  # the norm is always there; Statistic("parameter") or Signal("loss") would be asked for here

    def init(self, units, device):  # tensors alone: they are saved, resumed and compared over ranks
        return {"norms": torch.full((self.window,), torch.nan, dtype=torch.float64, device=device)}

    def decide(self, statistics, state):  # the same on all ranks: norms are reduced before. Changes nothing in place
        norm, median = statistics.norm(), state["norms"].nanmedian()
        bound = torch.where(median.isnan(), torch.inf, 2 * median)
        norms = torch.cat([state["norms"][1:], torch.minimum(norm, bound)[None]])  # a spike counts as its bound
        return distclip.Decision(bound), {"norms": torch.where(norm.isfinite(), norms, state["norms"])}


torch.manual_seed(0)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)
clipper = distclip.Clipper(model, TwiceTheMedian())

for step in range(60):
    x = torch.randn(64, 8) * (10 if step in (30, 45) else 1)  # two bad batches
    (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
    report = clipper.step(optimizer)
    optimizer.zero_grad()
    if report.coef < 1 or step % 20 == 0:
        print(f"step {step:2}: norm {report.norm:8.2f}, bound {report.max_norm:5.2f}, scaled by {report.coef:.4f}")
    assert (report.coef < 0.1) == (step in (30, 45))
