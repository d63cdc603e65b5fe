"""The policy protocol: from the reduced norm to a decision, as a pure function of norm and state.

A policy is a frozen dataclass of hyperparameters. What it remembers is a dictionary of tensors that the Clipper holds,
checkpoints and hands back, so that asking twice (``measure``) changes nothing and every rank, which sees the same
reduced norm, decides and remembers the same bits. Adding a policy is adding one file; behaviour is changed by
wrapping a policy, never by inheriting from one.
"""

from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

State: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with this step's gradients.

    * ``max_norm``: 0-d float64 bound on the total norm, ``inf`` for none.
    * ``skip``: 0-d bool, do not take the step; None from a policy that never skips.
    * ``bounds``: (low, high) for every element, applied after scaling; None for no elementwise clipping.
    """

    max_norm: Tensor
    skip: Tensor | None = None
    bounds: tuple[float, float] | None = None


@runtime_checkable
class Policy(Protocol):
    """Anything with these two methods can be handed to a Clipper."""

    def init(self, device: torch.device) -> State:
        """The state before the first step: tensors on ``device``; empty for a policy without memory."""
        ...

    def decide(self, norm: Tensor, state: State) -> tuple[Decision, State]:
        """Decide on ``norm`` (0-d float64, before clipping, may be NaN or inf) and return the state after it.

        Pure: neither argument is changed. Runs on the norm's device and reads nothing back to the host. The returned
        state has the keys, shapes and dtypes of ``init``.
        """
        ...
