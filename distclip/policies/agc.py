"""AGC: each row of a gradient is small beside the row of the parameter that it changes (Brock et al., ICML 2021)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch

from .adaptive import LEAST, coef_to, number
from .checks import euclidean, finite, positive
from .protocol import Decision, State
from .statistic import Dims, Statistic, dims_by_pattern
from .statistics import Statistics
from .trust import trusted
from .units import Units


@trusted
@dataclass(frozen=True, slots=True)
class AGC:
    """Multiply each row of a gradient, one output of its layer, by ``min(1, clipping * max(|W_row|, eps) / |G_row|)``.

    Rows are those of :class:`Statistic`. A parameter of fewer than two dimensions is one.

    * ``clipping``: above 0; the paper's 0.01 is for batches of 4096; smaller ones tolerate more. ``inf`` only measures.
    * ``eps``: finite, above 0: the least norm of a row of parameters, so that one of zeros moves.
    * ``exempt``: a pattern, or several, of parameters that are left alone; the paper exempts the weight of the last
      layer: ``exempt="head.weight"``. ValueError, when a Clipper is built, for what matches none.
    * ``unit_dims``: ``dims`` of the rows, for layers whose outputs are elsewhere: ``{"*.experts.w2": (0, 2)}``.

    Two numbers travel for each row of the model, also for those that are exempt. ValueError, when a Clipper is built,
    for a ``norm_type`` other than 2.

    Source: https://arxiv.org/abs/2102.06171

    >>> AGC(exempt="head.weight")
    AGC(clipping=0.01, eps=0.001, exempt=('head.weight',), unit_dims=())
    """

    clipping: float = 0.01
    eps: float = 1e-3
    exempt: str | Sequence[str] = ()
    unit_dims: Dims | Mapping[str, int | Sequence[int]] = ()

    def __post_init__(self) -> None:
        positive("clipping", self.clipping, "inf measures only")
        finite("eps", self.eps)
        patterns = (self.exempt,) if isinstance(self.exempt, str) else tuple(self.exempt)
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f"exempt must be a pattern or patterns of parameters, got {self.exempt!r}")
        object.__setattr__(self, "exempt", patterns)
        object.__setattr__(self, "unit_dims", dims_by_pattern(self.unit_dims, "unit_dims"))

    def needs(self) -> Sequence[Statistic]:
        both = (self._rows, Statistic("row", of="parameter", dims=self.unit_dims))
        return (*both, self._exempt) if self.exempt else both

    def init(self, units: Units, device: torch.device) -> State:
        euclidean(self, units)
        return {}

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        rows, units = self._rows, statistics.units
        values = statistics.norm(Statistic("row", of="parameter", dims=self.unit_dims))
        bounds = (torch.fmax(values, number(self.eps)) * self.clipping).clamp_(min=LEAST)  # eps in place of NaN
        if self.exempt:
            bounds.masked_fill_(units.spread(bounds.new_zeros(1), self._exempt, rows) == 0, inf)
        return Decision(bounds, coef=coef_to(bounds, statistics.norm(rows)), per=rows), state

    @property
    def _rows(self) -> Statistic:
        return Statistic("row", dims=self.unit_dims)

    @property
    def _exempt(self) -> Statistic:
        return Statistic("group", groups={"exempt": tuple(self.exempt)})
