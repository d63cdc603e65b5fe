"""The policy protocol: from the reduced norm to a decision, as a pure function of norm and state.

A policy is a frozen dataclass of hyperparameters. Its state is a dictionary of tensors that the Clipper keeps,
checkpoints and passes in. So asking twice (``measure``) changes nothing, and all ranks, which see the same reduced
norm, decide and remember the same bits. A new policy is a new file; behaviour is changed by wrapping a policy, never by
inheriting from one.
"""

from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

State: TypeAlias = dict[str, Tensor]
Number: TypeAlias = Tensor | float


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with this step's gradients. A number is a Python number, or a real tensor with one element.

    * ``max_norm``: the bound on the total norm, above 0; ``inf`` for none.
    * ``skip``: whether to skip the step: a bool or a 0-d tensor; None from a policy that never skips.
    * ``bounds``: (low, high) for every element, applied after scaling, ``low <= 0 <= high`` and not both 0; None for no
      elementwise clipping.
    * ``coef``: the factor for gradients, above 0 and at most 1; None for torch's
      ``min(1, max_norm / (norm + 1e-6))``. If it is given, ``max_norm`` is only reported.

    Anything else is a ValueError in that call, and nothing has changed. In a step that is skipped, or whose norm is not
    finite, any number will do. On an accelerator, where reading the number would be a host sync, the step is skipped
    with a reported norm of NaN, and the next call raises.
    """

    max_norm: Number
    skip: Tensor | bool | None = None
    bounds: tuple[Number, Number] | None = None
    coef: Number | None = None


@runtime_checkable
class Policy(Protocol):
    """A Clipper takes any object with these two methods."""

    def init(self, device: torch.device) -> State:
        """The state before the first step: tensors on ``device``; empty for a policy without memory."""
        ...

    def decide(self, norm: Tensor, state: State) -> tuple[Decision, State]:
        """Decide on ``norm`` (0-d float64, before clipping, may be NaN or inf) and return the state after it.

        Pure: the same arguments give the same result on every rank. Both are copies. Runs on the norm's device without
        a host sync. The returned state has the keys, shapes and dtypes of ``init``.
        """
        ...
