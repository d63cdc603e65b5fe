"""What the ranks of test_deepspeed.py run: DeepSpeed training in fresh processes that have no compiler on the PATH."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip

STEPS = 10
ROWS = 8  # of the global batch of one step, a multiple of ranks times accumulated batches

BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": 0.0,
    "steps_per_print": 10**9,
}
BF16 = {"bf16": {"enabled": True}}
UNMANAGED = {"managed_gradient_accumulation": False}
CPU = {"device": "cpu"}


def zero(stage: int, **options: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **options}}


class Net(nn.Module):
    """Uneven sizes, a parameter that is frozen, and two groups: no partition ends where a parameter does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 13)
        self.frozen = nn.Linear(13, 13, bias=False).requires_grad_(False)
        self.norm = nn.LayerNorm(13)
        self.blocks = nn.ModuleList([nn.Linear(13, 13), nn.Linear(13, 9)])
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh()
        x = self.norm(x + self.frozen(x))
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    some = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in some if p.ndim > 1]}, {"params": [p for p in some if p.ndim < 2], "lr": 0.03}]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def rows(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of one step; errors are now large, now small, so that the norms differ."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 6, generator=generator)
    return x, (1.0 + 3.0 * (step % 3)) * torch.randn(ROWS, 3, generator=generator)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    dtype = next(model.parameters()).dtype
    return (model(x.to(dtype)) - y.to(dtype)).square().sum(1).mean()


def alone(policy: Any, nan_at: int = -1) -> dict[str, Any]:
    """One process with the same global batches, clipped by a plain Clipper."""
    model = build()
    optimizer = sgd(model)
    clipper = distclip.Clipper(model, policy, group=None)
    reports = []
    for step in range(STEPS):
        x, y = rows(step)
        loss_of(model, x, y * float("nan") if step == nan_at else y).backward()
        reports.append(clipper.step(optimizer).to_dict())
        optimizer.zero_grad()
    return {"reports": reports, "parameters": {name: p.detach() for name, p in model.named_parameters()}}


def by_hand(bound: float) -> dict[str, Any]:
    """The same for MaxNorm, clipped by its definition, without distclip."""
    model = build()
    optimizer = sgd(model)
    norms = []
    for step in range(STEPS):
        loss_of(model, *rows(step)).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.cat([g.flatten().double() for g in gradients]).norm().item()
        for g in gradients:
            g.mul_(min(1.0, bound / (norm + 1e-6)))
        optimizer.step()
        optimizer.zero_grad()
        norms.append(norm)
    return {"norms": norms, "parameters": {name: p.detach() for name, p in model.named_parameters()}}


@contextmanager
def deepspeed_without_a_compiler() -> Iterator[Any]:
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "PATH": "/nowhere",
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops

        deepspeed.logger.setLevel("ERROR")
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")
        yield deepspeed


def engine_of(config: dict[str, Any], make: Callable[[], nn.Module] = build, accumulate: int = 1) -> Any:
    import deepspeed

    model = make()
    config = {**BASE, "gradient_accumulation_steps": accumulate, **config}
    return deepspeed.initialize(model=model, optimizer=sgd(model), config=config)[0]


def parameters_of(engine: Any) -> dict[str, Tensor]:
    """Whole parameters, in fp32."""
    import deepspeed

    found = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p]):
            found[name] = p.detach().float().clone()
    return found


def feed(engine: Any, step: int, accumulate: int = 1, spoil: bool = False) -> None:
    """The backwards of one optimizer step, and every engine.step() of it but the last."""
    x, y = rows(step)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    batches = list(zip(x[mine].chunk(accumulate), y[mine].chunk(accumulate), strict=True))
    for k, (x, y) in enumerate(batches):
        bad = spoil and k == 0 and dist.get_rank() == dist.get_world_size() - 1
        engine.backward(loss_of(engine, x, y * float("nan") if bad else y))
        if k < len(batches) - 1 and engine.managed_gradient_accumulation():
            engine.step()


def train(config: dict[str, Any], policy: Any, accumulate: int = 1, nan_at: int = -1) -> dict[str, Any]:
    from distclip.integrations.deepspeed import take_over

    engine = engine_of(config, accumulate=accumulate)
    clipper = take_over(engine, policy)
    reports, norms, unchanged = [], [], None
    for step in range(STEPS):
        feed(engine, step, accumulate, spoil=step == nan_at)
        before = parameters_of(engine) if step == nan_at else None
        engine.step()
        if before is not None:
            unchanged = all(torch.equal(p, before[name]) for name, p in parameters_of(engine).items())
        reports.append(clipper.report.to_dict())
        norms.append(float(engine.get_global_grad_norm()))
    return {
        "reports": reports,
        "norms": norms,
        "parameters": parameters_of(engine),
        "unchanged": unchanged,
        "skipped": engine.skipped_steps,
        "culprit": clipper.culprit,
        "optimizer": type(engine.optimizer).__name__,
    }
