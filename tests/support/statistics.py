"""Statistics as a policy is shown them, beside those of whole tensors in float64; and what travels for them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import inf

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distclip import Decision, Statistic
from support.oracle import rows_in, true_norm


@dataclass
class Recorder:
    """Bounds nothing, and keeps what it is shown."""

    asked: tuple[Statistic, ...] = ()
    seen: dict[Statistic, Tensor] = field(default_factory=dict, repr=False)

    def needs(self):
        return self.asked

    def init(self, units, device):
        return {}

    def decide(self, statistics, state):
        self.seen = {each: statistics.norm(each).clone() for each in (Statistic(), *self.asked)}
        return Decision(inf), state


@contextmanager
def lengths() -> Iterator[list[int]]:
    """How many numbers travel in each all-reduce inside, once it is over."""
    with _Lengths() as mode:
        yield mode.lengths


class _Lengths(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("c10d::"):
            assert func.name() == "c10d::allreduce_", "no other collective"
            self.lengths.append(args[0][0].numel())
        return func(*args, **(kwargs or {}))


def both(*statistics: Statistic) -> tuple[Statistic, ...]:
    return (*statistics, *(Statistic(each.per, "parameter", each.groups) for each in statistics))


def members(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The parameters of a group."""
    both_names = {name: (name, name.partition("[")[0]) for name in names}
    return [n for n, ns in both_names.items() if any(p in ns or any(fnmatchcase(x, p) for x in ns) for p in patterns)]


def expected(statistic: Statistic, whole: Mapping[str, Tensor], names: Sequence[str], p: float) -> list[float]:
    """Its norms in the order of units: parameters of these ``names``."""
    nothing = torch.zeros(1)
    whole = {name: tensor.abs() if tensor.is_complex() else tensor for name, tensor in whole.items()}
    match statistic.per:
        case "model":
            return [true_norm(whole.values(), p)]
        case "group":
            chosen = [members(patterns, names) for _, patterns in statistic.named]
            return [true_norm([whole.get(name, nothing) for name in group], p) for group in chosen]
        case "parameter":
            return [true_norm([whole.get(name, nothing)], p) for name in names]
        case "row":
            return [true_norm([row], p) for name in names for row in rows_in(whole[name])]
