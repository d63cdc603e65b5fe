"""Twenty steps on several ranks give the norms and the parameters of one process with the same batches."""

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW

import distclip
from support.layouts import backward, build, ddp, fsdp2
from support.ranks import run_ranks, same_bits
from support.samples import crossed

STEPS = 20
BOUND = 1.4  # between the norms of the run, so that some steps are clipped and some are not
OPTIMIZERS = {
    "adamw": lambda parameters: AdamW(parameters, lr=1e-3, eps=1e-4),
    "fused_adamw": lambda parameters: AdamW(parameters, lr=1e-3, eps=1e-4, fused=True),
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
}


def train(layout, optimizer: str, how: str) -> tuple[list[float], list[bool], list[torch.Tensor]]:
    """Norm and whether it was clipped for every step, and the whole parameters at the end."""
    model = layout()
    steps = OPTIMIZERS[optimizer](model.parameters())
    clipper = distclip.Clipper(model, BOUND)
    norms, clipped = [], []
    for step in range(STEPS):
        backward(model, step)
        if how == "step":
            report = clipper.step(steps)
            norms.append(report.norm.item())
        elif how == "clip_":
            norms.append(clipper.clip_().norm.item())
            steps.step()
        else:
            norms.append(distclip.clip_grad_norm_(model.parameters(), BOUND).item())
            steps.step()
        steps.zero_grad()
        clipped.append(norms[-1] > BOUND)
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return norms, clipped, [p.detach().clone() for p in whole]


@pytest.fixture(scope="module")
def alone():
    """One process, clipped by hand from its definition and stepped by a plain optimizer."""

    def run(optimizer: str):
        model = build()
        steps = OPTIMIZERS[optimizer.removeprefix("fused_")](model.parameters())
        norms = []
        for step in range(STEPS):
            backward(model, step)
            norm = torch.cat([p.grad.flatten().double() for p in model.parameters()]).norm().item()
            for p in model.parameters():
                p.grad.mul_(min(1.0, BOUND / (norm + 1e-6)))
            steps.step()
            steps.zero_grad()
            norms.append(norm)
        return norms, [p.detach() for p in model.parameters()]

    known = {}
    return lambda optimizer: known.setdefault(optimizer, run(optimizer))


LAYOUTS = [(ddp, 2), (fsdp2, 2), (fsdp2, 3)]
HOW = ["clip_", "step", "function"]  # a fused optimizer steps


@pytest.mark.parametrize(
    ("layout", "size", "optimizer", "how"),
    crossed([(*layout, optimizer) for layout in LAYOUTS for optimizer in OPTIMIZERS], HOW),
)
def test_training_is_that_of_one_process(alone, layout, size, optimizer, how):
    norms, parameters = alone(optimizer)
    results = run_ranks(train, size, layout, optimizer, how)
    assert same_bits([r[0] for r in results])
    found, clipped, whole = results[0]
    assert any(clipped), "no step was above the bound"
    assert not all(clipped), "no step was below the bound"
    assert found == pytest.approx(norms, rel=1e-6)
    for mine, theirs in zip(whole, parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
