"""One run: a model, its losses, and the policy between backward and step."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from distclip import Clipper, Policy


def train(model: nn.Module, optimizer: Optimizer, policy: Policy | None, losses: Iterable[Tensor]) -> None:
    """Make a step for each loss, which is computed when it is asked for. Without a policy nothing is clipped."""
    clipper = None if policy is None else Clipper(model, policy)
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        if clipper is None:
            optimizer.step()
        else:
            clipper.step(optimizer)
