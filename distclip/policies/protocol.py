"""The policy protocol: from reduced norms to a decision, as a pure function of them and of a state.

A policy is a frozen dataclass of hyperparameters. Its state is a dictionary of tensors that the Clipper keeps,
checkpoints and passes in. So asking twice (``measure``) changes nothing, and all ranks, which see the same reduced
norms, decide and remember the same bits. A new policy is a new file; behaviour is changed by wrapping a policy, never
by inheriting from one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from .statistic import Per, Signal, Statistic
from .statistics import Statistics
from .units import Units

State: TypeAlias = dict[str, Tensor]
Number: TypeAlias = Tensor | float


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with this step's gradients. A number is a Python number, or a real tensor with one element.

    * ``max_norm``: the bound on the total norm, above 0; ``inf`` for none. With ``per``: on the norm of each unit,
      (units,), or one number for all of them.
    * ``skip``: whether to skip the step: a bool or a 0-d tensor; None from a policy that never skips.
    * ``bounds``: (low, high) for every element, applied after scaling, ``low <= 0 <= high`` and not both 0; None for no
      elementwise clipping.
    * ``coef``: the factor for gradients, above 0 and finite, or (units,) with ``per``; None for torch's
      ``min(1, max_norm / (norm + 1e-6))``. If it is given, ``max_norm`` is only reported.
    * ``per``: what is bounded: the units of a statistic of gradients that :meth:`Policy.needs` lists. Groups must not
      overlap then; parameters in none of them keep their gradients.
    * ``extra``: numbers to report by name, 0-d: ``report.extra``. They change nothing.

    Anything else is a ValueError in that call, and nothing has changed. In a step that is skipped, and for a model or
    unit whose norm is not finite, any number will do. On an accelerator, where reading the number would be a host sync,
    the step is skipped with a reported norm of NaN, and the next call raises.
    """

    max_norm: Number
    skip: Tensor | bool | None = None
    bounds: tuple[Number, Number] | None = None
    coef: Number | None = None
    per: Per | Statistic = "model"
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Policy(Protocol):
    """A Clipper takes any object with these three methods."""

    def needs(self) -> Sequence[Statistic | Signal]:
        """The statistics and signals to decide on, beside the norm of all gradients; empty for no others."""
        ...

    def init(self, units: Units, device: torch.device) -> State:
        """The state before the first step: tensors on ``device``; empty for a policy without memory.

        Pure, and asked more than once. A dimension that is as long as there are parameters (or rows), and longer for
        longer ``units``, has an entry for each of them: it is saved with their names, and loaded by them.
        """
        ...

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        """Decide on ``statistics``, and return the state after it.

        Pure: the same arguments give the same result on every rank. Both are copies. Runs on the statistics' device
        without a host sync. The returned state has the keys, shapes and dtypes of ``init``.
        """
        ...
