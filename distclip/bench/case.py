"""What is measured: a case is one line of the table, a contest is its model and calls on this rank."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isclose
from typing import Literal, TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip.bench.place import Place

Call: TypeAlias = Callable[[], Tensor | None]
"""What is measured once: it returns the norm that it found before clipping, if it looks for one."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Contest:
    """The calls of one case, by name, all on the same gradients.

    ``prepare`` makes or restores the gradients before every call. ``norm`` is their norm, ``max_norm`` the bound.
    ``constants`` are quantities that need no measuring. ``group``: the ranks that take part, None for all.
    """

    calls: Mapping[str, Call]
    prepare: Callable[[], None]
    norm: float
    max_norm: float
    constants: Mapping[str, float] = field(default_factory=dict)
    group: dist.ProcessGroup | None = None

    def check(self, norm: Tensor | None) -> None:
        """Check that every call had the same gradients, so that the bound was in force for all or for none."""
        if norm is None:
            return
        found = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        assert isclose(found, self.norm, rel_tol=1e-3), f"a call met gradients of norm {found}, not {self.norm}"
        assert (found > self.max_norm) == (self.norm > self.max_norm)


@dataclass(kw_only=True, slots=True, frozen=True)
class Case:
    """One line of the table: the ratio of the two quantities named in ``over``, and the ``goal`` set for it, if any."""

    name: str
    what: str
    build: Callable[[Place], Contest]
    goal: float | None
    at_most: bool = False
    over: tuple[str, str] = ("torch", "distclip")
    unit: Literal["ms", "KiB"] = "ms"
    rounds: int
    warmups: int = 3
    alone: bool = False

    @property
    def wanted(self) -> str:
        return "" if self.goal is None else f"{'<=' if self.at_most else '>='} {self.goal:g}"

    def met(self, ratio: float) -> bool | None:
        """None without a goal."""
        if self.goal is None:
            return None
        return ratio <= self.goal if self.at_most else ratio >= self.goal
