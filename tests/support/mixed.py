"""Gradients of many steps at the cost of three: real ones, mixed anew in each step.

What a layout is to a step of a Clipper is all in the gradients; another backward pass through it takes several times as
long as the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Self

from torch import Tensor, nn

from support.trained import Training

MIXED = (0, 6, 12)  # of equal loss scales


def shares(step: int, size: float) -> list[float]:
    """How much of each of the mixed gradients is in those of a step."""
    random = Random(step)
    return [size * random.lognormvariate(0, 0.2) for _ in MIXED]


def local_of(gradient: Tensor) -> Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


@dataclass(frozen=True, slots=True)
class Mixture:
    """``gradients``: as backward passes make them; ``copies``: what this rank has of each, in each of ``MIXED``.

    Some may be empty; parameters without a gradient here are not among them.
    """

    parameters: list[nn.Parameter]
    gradients: list[Tensor]
    copies: list[list[Tensor]]

    @classmethod
    def of(cls, training: Training) -> Self:
        parameters, copies = [p for part in training.parts for p in part.parameters()], []
        for step in MIXED:
            for p in parameters:
                p.grad = None
            training.backward(step)
            parameters = [p for p in parameters if p.grad is not None]
            copies.append([local_of(p.grad).clone() for p in parameters])
        return cls(parameters, [p.grad for p in parameters], [list(own) for own in zip(*copies, strict=True)])

    def mixed(self, numbers: Sequence[float]) -> list[Tensor]:
        return [sum(n * tensor for n, tensor in zip(numbers, own, strict=True)) for own in self.copies]

    def mix(self, numbers: Sequence[float]) -> None:
        """Make gradients of this step; of the same tensors, since a call may have put others in their place."""
        for p, gradient, new in zip(self.parameters, self.gradients, self.mixed(numbers), strict=True):
            local_of(gradient).copy_(new)
            p.grad = gradient

    def break_(self) -> None:
        """A NaN in what this rank has."""
        next(local for gradient in self.gradients if (local := local_of(gradient)).numel()).view(-1)[0] = float("nan")
