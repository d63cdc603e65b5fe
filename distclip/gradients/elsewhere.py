"""Gradients that are not in ``.grad``: in another attribute of the parameters, or where a function finds them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import refusals
from .look import laid_out
from .storage import GradientFn, Storage

ABSENT = object()


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter whose gradient is elsewhere: what errors call it, and whether it may be that of a part alone.

    torch sees to it that ``.grad`` is like its parameter; of what is elsewhere nobody does.
    """

    name: str
    holder: Tensor
    may_be_part: bool

    def checked(self, gradient: object) -> Tensor | None:
        """``gradient``; LayoutError where it cannot be that of this parameter."""
        if gradient is None:
            return None
        if not isinstance(gradient, Tensor):
            raise refusals.no_tensor(type(gradient).__name__, self.name)
        alike = isinstance(gradient, DTensor) == isinstance(self.holder, DTensor)  # else that is what is said
        if alike and gradient.numel() != self.holder.numel() and not self.may_be_part:
            raise refusals.other_size(gradient.numel(), self.name, self.holder.numel())
        return gradient

    def kept(self, gradient: Tensor | None) -> Tensor | None:
        """``gradient``; LayoutError where another tensor would have to take its place to be clipped."""
        if gradient is None:
            return None
        both = isinstance(gradient, DTensor) and isinstance(self.holder, DTensor)
        placed = not both or gradient.placements == self.holder.placements  # type: ignore[attr-defined]
        coalesced = gradient.layout != torch.sparse_coo or gradient.is_coalesced()
        if placed and coalesced and laid_out(gradient) is None:
            return gradient
        raise refusals.not_replaceable(self.name)


def in_attribute(places: Sequence[Place], name: str) -> Storage:
    """Another attribute of the parameters, as ``main_grad``; one without it has no gradient, but some must have it."""

    def read() -> list[Tensor | None]:
        found = [getattr(place.holder, name, ABSENT) for place in places]
        if places and all(gradient is ABSENT for gradient in found):
            raise refusals.nowhere(name)
        return [place.checked(None if g is ABSENT else g) for place, g in zip(places, found, strict=True)]

    return Storage(read, lambda index, gradient: setattr(places[index].holder, name, gradient))


def given_by(places: Sequence[Place], function: GradientFn) -> Storage:
    """What ``function`` returns: the very tensors that will be stepped with, which are scaled in place."""

    def store(index: int, gradient: Tensor) -> None:
        raise AssertionError(f"the gradient of {places[index].name} was to stay where it is")

    return Storage(lambda: [p.kept(p.checked(function(p.name, p.holder))) for p in places], store)
