"""Reduce, clip, update, gather in one step(): torchrun --nproc-per-node 2 examples/optimizer_that_reduces.py"""

import torch
import torch.distributed as dist

from distclip import Clipper, Layout
from distclip.step.driver import Driver
from distclip.step.engine import Engine


class ShardedAdamW(torch.optim.AdamW):
    """Each rank updates its rows of every parameter and has the state of those alone, as in nanochat's MuonAdamW."""

    def __init__(self, model, policy, **options):
        rank, self.world = dist.get_rank(), dist.get_world_size()
        self.rows = rows = {p: p.detach().chunk(self.world)[rank] for p in model.parameters()}  # views of the model
        super().__init__(self.rows.values(), **options)
        self.engine = Engine(model, policy, gradients=lambda _, p: rows[p].grad, layout=lambda *_: Layout(1))
        self.clipper = Clipper.of(self.engine, Driver("ShardedAdamW.step()"))

    def step(self):
        for p, rows in self.rows.items():  # 1. reduce: the mean over ranks, of this rank's rows
            rows.grad = torch.empty_like(rows)
            dist.reduce_scatter(rows.grad, list((p.grad / self.world).chunk(self.world)))
        if not self.engine.clip_().skip:  # 2. clip by the norm over all rows of all ranks
            super().step()  # 3. update
        for p, rows in self.rows.items():  # 4. gather
            dist.all_gather(list(p.detach().chunk(self.world)), rows)


dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
optimizer = ShardedAdamW(model, 1.0, lr=1e-2)
for _ in range(20):
    (model(x := torch.randn(16, 8) + dist.get_rank()) - x.flip(1)).square().mean().backward()
    optimizer.step()
    model.zero_grad()
print(optimizer.clipper.report.to_dict())
dist.destroy_process_group()
