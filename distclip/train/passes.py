"""Forward and backward of this rank's part of a batch."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn
from torch.nn import functional as F


class Answer(NamedTuple):
    """The mean loss over this rank's samples, and its logits (samples, ..., classes)."""

    loss: Tensor
    logits: Tensor


class Passes(Protocol):
    """All ranks call, each with its data-parallel part of the batch; ranks without logits return None."""

    def forward_backward(self, inputs: Tensor, targets: Tensor) -> Answer | None:
        """Leave in `.grad` the gradients of the mean loss over the global batch."""

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """The logits, without gradients."""


def losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of every target, at least in float32."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none").view_as(targets)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


@dataclass(kw_only=True, slots=True, frozen=True)
class Whole:
    """A model that is called as one, whatever wraps it."""

    model: nn.Module

    def forward_backward(self, inputs: Tensor, targets: Tensor) -> Answer | None:
        logits = self.model(inputs)
        loss = mean_loss(logits, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return Answer(loss.detach(), logits.detach())

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        return self.model(inputs)  # type: ignore[no-any-return]
