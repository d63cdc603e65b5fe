"""What of a rank goes into a checkpoint, and that to look at it changes nothing."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from distclip import Clipper
from distclip.train.held import Held
from support.ranks import run_ranks, same_bits


def trained(kind: type[Optimizer], saved: bool) -> list[torch.Tensor]:
    """Six steps, of which the first two are skipped; after these a checkpoint is written, perhaps."""
    model = nn.Linear(4, 2)
    settings = {"lr": 0.1, "momentum": 0.9} if kind is SGD else {"lr": 0.1}
    optimizer = kind(model.parameters(), **settings)
    held = Held(model=model, optimizer=optimizer, clipper=Clipper(model, 1.0))
    for step in range(6):
        rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        (model(rows).square().sum() * (torch.nan if step < 2 else 1.0)).backward()
        held.step(None)
        if saved and step == 1:
            held.state()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_a_checkpoint_before_the_first_step_of_the_optimizer_changes_nothing(kind):
    """torch fills the state by a step of zeros, which Adam counted: every bias correction after it was another."""
    assert same_bits([run_ranks(trained, 1, kind, saved)[0] for saved in (False, True)])
