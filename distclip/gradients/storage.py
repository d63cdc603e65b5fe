"""Where the gradients of parameters are read, and stored when another tensor takes their place: `.grad` unless told.

Private torch API, read in 2.13 and 2.6: ``DisableTorchFunctionSubclass``.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Self, TypeAlias

import torch
from torch import Tensor

Store: TypeAlias = Callable[[int, Tensor], None]
"""Puts a gradient in the place of that of the parameter of this index."""

GradientFn: TypeAlias = Callable[[str, Tensor], Tensor | None]
"""The gradient of a parameter by its name, where it is not in ``.grad``; None where there is none."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How a Clipper gets at the gradients of its parameters.

    * ``read()``: one for each parameter, None where there is none: plain tensors or DTensors that are scaled in place.
    * ``store``: see :data:`Store`.
    * ``scale()``: by what they are multiplied, which the norm that is reported must not be; None for nothing.
    * ``in_grad``: they are those in ``.grad``, which torch's optimizers and a GradScaler read.
    """

    read: Callable[[], list[Tensor | None]]
    store: Store
    scale: Callable[[], float] | None = None
    in_grad: bool = False

    def among(self, holders: Sequence[Tensor], counted: Set[int] | None) -> Self:
        """The same without the gradients of ``holders`` whose ids are not ``counted``; None for all."""
        return self if counted is None else replace(self, read=partial(_of_some, self.read, holders, counted))


def _of_some(
    read: Callable[[], list[Tensor | None]], holders: Sequence[Tensor], counted: Set[int]
) -> list[Tensor | None]:
    return [g if id(holder) in counted else None for holder, g in zip(holders, read(), strict=True)]


def in_grad(holders: Sequence[Tensor]) -> Storage:
    """``.grad``, as torch has it."""

    return Storage(partial(gradients_of, holders), partial(store_in_grad, holders), in_grad=True)


def store_in_grad(holders: Sequence[Tensor], index: int, gradient: Tensor) -> None:
    """Put ``gradient`` into the ``.grad`` of the holder of this index."""
    holders[index].grad = gradient


def gradients_of(holders: Sequence[Tensor]) -> list[Tensor | None]:
    """What is in ``.grad``. Each DTensor is asked for a ``__torch_function__`` before, which takes twice as long."""
    with torch._C.DisableTorchFunctionSubclass():
        return [holder.grad for holder in holders]
