"""Steps whose norm or loss is a spike are not made: the skip-step of OLMo-core, and Megatron's threshold."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from .adaptive import learnt_from, moved_on, winsorised
from .checks import positive, whole
from .protocol import Decision, State
from .statistic import Signal
from .statistics import Statistics
from .trust import trusted
from .units import Units

EPS = 1e-6  # deviations are at least that share of the mean, so that rounding is no spike
BELOW = 1e150  # larger numbers have squares that may not add up in float64


@trusted
@dataclass(frozen=True, slots=True)
class SkipSpikes:
    """Skip steps whose norm is above ``max_norm``, or ``sigma`` standard deviations above the mean of recent ones.

    * ``max_norm``: the absolute bound; ``inf`` for none. ``sigma``: above 0; ``inf`` for the absolute bound alone.
    * ``window``: how many numbers mean and standard deviation are of. The rule begins when half of them are there.
    * ``patience``: after so many steps in a row that were skipped by ``sigma`` their numbers become the window: a level
      that lasts is no spike.
    * ``on``: what is looked at: ``"norm"``, and signals by their names. ``SkipSpikes(on=("norm", "loss"))`` skips where
      one of the two is a spike: ``clipper.step(optimizer, signals={"loss": loss})``.

    It clips nothing: put it first in a :class:`Chain`. A step with a signal that is NaN or inf is skipped; one whose
    norm is not finite is left to ``nonfinite=`` of the Clipper. Numbers of either, and of steps without gradients, are
    not recorded.

    OLMo-core's rule (window 128, sigma 6, ``torch.std_mean`` of the window before this step), but a number beyond
    ``sigma`` deviations is recorded at these, and the first half window is winsorised by its median. There a spike
    is recorded as it is, and hides later ones; left out altogether, a new level would be skipped for good.

    State, float64 and int64, none where ``sigma`` is ``inf``: ``window``, (names, window), the newest last, inf where
    unused; ``latest``, (names, patience), as they came; ``count`` of recorded steps, ``skips`` in a row.

    Source: SkipStepOptimizer of https://github.com/allenai/OLMo-core, and grad_norm_skip_threshold of
    https://github.com/NVIDIA/Megatron-LM.
    """

    max_norm: float = inf
    sigma: float = 6.0
    window: int = 128
    patience: int = 16
    on: tuple[str, ...] = ("norm",)

    def __post_init__(self) -> None:
        positive("max_norm", self.max_norm)
        positive("sigma", self.sigma)
        whole("window", self.window, 2)
        whole("patience", self.patience, 2)
        if self.patience > self.window:
            raise ValueError(f"patience must be at most window, {self.window}, got {self.patience}")
        on = (self.on,) if isinstance(self.on, str) else tuple(self.on)
        if not on or not all(isinstance(name, str) and name for name in on) or len({*on}) < len(on):
            raise ValueError(f"on must be different names, 'norm' or of signals, got {self.on!r}")
        object.__setattr__(self, "on", on)

    def needs(self) -> Sequence[Signal]:
        return tuple(Signal(name) for name in self.on if name != "norm")

    def init(self, units: Units, device: torch.device) -> State:
        if self.sigma == inf:
            return {}
        shape = units.shape()
        lengths = {"window": self.window, "latest": self.patience}
        found = {
            name: torch.full((*shape, len(self.on), length), inf, dtype=torch.float64, device=device)
            for name, length in lengths.items()
        }
        return found | {name: torch.zeros(shape, dtype=torch.int64, device=device) for name in ("count", "skips")}

    def decide(self, statistics: Statistics, state: State) -> tuple[Decision, State]:
        norm = statistics.norm()
        numbers = [norm if name == "norm" else statistics.signal(name).expand_as(norm) for name in self.on]
        now = torch.stack(numbers, -1)
        skip = ((norm > self.max_norm) | ~now.isfinite().all(-1)) & norm.isfinite()
        if self.sigma == inf:
            return Decision(inf, skip), state
        low, high = self._limits(state)
        spike = (now > high).any(-1) & norm.isfinite() & (state["count"] >= self._begins)
        return Decision(inf, skip | spike), self._learn(now, norm, spike, torch.clamp(now, low, high), state)

    @property
    def _begins(self) -> int:
        return max(2, self.window // 2)

    def _limits(self, state: State) -> tuple[Tensor, Tensor]:
        """(..., names) each; any numbers where there are fewer than two to go by."""
        known = state["window"] < inf
        count = known.sum(-1)
        mean = state["window"].masked_fill(~known, 0.0).sum(-1) / count
        squares = (state["window"] - mean.unsqueeze(-1)).masked_fill(~known, 0.0).square()
        std = (squares.sum(-1) / (count - 1)).sqrt()
        reach = self.sigma * torch.maximum(std, EPS * mean.abs())
        return mean - reach, mean + reach

    def _learn(self, now: Tensor, norm: Tensor, spike: Tensor, limited: Tensor, state: State) -> State:
        learns = learnt_from(norm, BELOW) & (now.abs() < BELOW).all(-1)
        count, each = state["count"] + learns, learns.unsqueeze(-1)
        skips = torch.where(learns, (state["skips"] + 1) * spike, state["skips"])
        begun = (count > self._begins).unsqueeze(-1)
        window = moved_on(state["window"], torch.where(begun, limited, now), each)
        latest = moved_on(state["latest"], now, each)
        begins, relearns = learns & (count == self._begins), learns & (skips == self.patience)
        window = torch.where(_over(begins), self._anew(window[..., -self._begins :]), window)
        window = torch.where(_over(relearns), self._anew(latest), window)
        return {"window": window, "latest": latest, "count": count, "skips": skips.masked_fill(relearns, 0)}

    def _anew(self, numbers: Tensor) -> Tensor:
        """A window of these, winsorised, and of nothing before."""
        unused = numbers.new_full((*numbers.shape[:-1], self.window - numbers.shape[-1]), inf)
        return torch.cat([unused, winsorised(numbers, self.sigma)], -1)


def _over(units: Tensor) -> Tensor:
    """The same for each name and each place of a window."""
    return units.unsqueeze(-1).unsqueeze(-1)
