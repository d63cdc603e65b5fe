"""Policies by parameter and by row, written from their papers for one process: loops over numbers, without distclip."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, sqrt

from torch import Tensor

from support.oracle import rows_in

Tensors = Mapping[str, Tensor]
Factors = dict[str, list[float]]
"""Of each parameter: a factor for each of its units, which are its rows or the whole of it."""


def norm_of(tensor: Tensor) -> float:
    return sqrt(sum(x * x for x in tensor.double().flatten().tolist()))


@dataclass
class BlockRMS:
    """Adafactor, section 6: ``u / max(1, RMS(u) / d)``."""

    d: float

    def factors(self, gradients: Tensors, weights: Tensors) -> Factors:
        return {name: [1 / max(1.0, norm_of(g) / sqrt(g.numel()) / self.d)] for name, g in gradients.items()}


@dataclass
class AdaptiveClipping:
    """AdaGC, algorithm 1: means start from the smallest clipped norm of the warm-up."""

    absolute: float
    relative: float
    beta: float
    start: int
    means: dict[str, float] = field(default_factory=dict)
    steps: int = 0

    def factors(self, gradients: Tensors, weights: Tensors) -> Factors:
        norms = {name: norm_of(g) for name, g in gradients.items()}
        total, found = sqrt(sum(n * n for n in norms.values())), {}
        for name, norm in norms.items():
            mean = self.means.get(name, inf)
            if self.steps < self.start:
                factor = min(1.0, self.absolute / total)
                self.means[name] = min(mean, factor * norm)
            else:
                factor = min(1.0, self.relative * mean / norm)
                self.means[name] = self.beta * mean + (1 - self.beta) * factor * norm
            found[name] = [factor]
        self.steps += 1
        return found


@dataclass
class UnitwiseClipping:
    """AGC, equation 3, with the largest norm of parameters or ``eps``; rows of all but ``exempt``."""

    clipping: float
    eps: float
    exempt: tuple[str, ...] = ()

    def factors(self, gradients: Tensors, weights: Tensors) -> Factors:
        found = {}
        for name, gradient in gradients.items():
            pairs = zip(rows_in(gradient), rows_in(weights[name]), strict=True)
            found[name] = [self._factor(norm_of(g), norm_of(w)) for g, w in pairs if name not in self.exempt]
        return found

    def _factor(self, gradient: float, weight: float) -> float:
        bound = self.clipping * max(weight, self.eps)
        return bound / gradient if gradient > bound else 1.0
