"""History: what the steps of a Clipper have been, in counts that never grow."""

from collections import Counter
from dataclasses import dataclass, field, replace
from math import ceil, exp, inf, isfinite, log, nan
from typing import Any

import torch
from torch import Tensor

from ..kernels.transfer import Transfer
from ..policies.adopt import with_keys
from ..policies.checks import count, is_dense
from ..report import Report

ERROR = 0.01  # relative, of a quantile
STEP = log((1 + ERROR) / (1 - ERROR))  # of the logarithm of a norm, from one bucket to the next
FARTHEST = ceil(log(1e20) / STEP)  # the last bucket on either side of 1
SIZE = 2 * FARTHEST + 2  # buckets, with one for 0
KEPT = 256  # reports on an accelerator that are read together

_COUNTS = ("steps", "clipped", "skipped", "nonfinite", "longest_skips", "current_skips", "largest_step")


@dataclass(slots=True)
class History:
    """Counts over all calls of ``clip_`` and ``step``, those before a checkpoint included; the same on every rank.

    * ``steps``: calls that are counted here: all but those captured in a CUDA graph.
    * ``clipped``: steps that were taken with a coefficient below 1. Clamping values is no clipping in this sense.
    * ``skipped``: steps that no rank took; ``nonfinite``: steps whose norm was not finite, skipped or not.
    * ``longest_skips``, ``current_skips``: the longest run of skipped steps, and the one that is going on.
    * ``largest``, ``largest_step``: the largest finite norm before clipping, and its step, from 1; 0 before the first.

    >>> history = History()
    >>> for norm in (1.0, 2.0, 4.0, float("nan")):
    ...     history.add(norm, coef=min(1.0, 2.0 / norm), skip=norm != norm)
    >>> history.steps, history.clipped, history.skipped, history.largest, history.largest_step
    (4, 1, 1, 4.0, 3)
    >>> round(history.quantile(0.5), 1)
    2.0
    """

    steps: int = 0
    clipped: int = 0
    skipped: int = 0
    nonfinite: int = 0
    longest_skips: int = 0
    current_skips: int = 0
    largest: float = 0.0
    largest_step: int = 0
    _norms: Counter[int] = field(default_factory=Counter, repr=False)  # by bucket of the logarithm

    def quantile(self, q: float) -> float:
        """The ``q``-quantile, 0 to 1, of the finite norms; NaN if there was none.

        Within 1 % of a norm that was seen, for norms from 1e-20 to 1e20 (others count as the nearer of the two).
        """
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile is between 0 and 1, not {q!r}")
        rank = q * (self._norms.total() - 1)
        seen = 0
        for bucket in sorted(self._norms):
            seen += self._norms[bucket]
            if seen > rank:
                return _middle(bucket)
        return nan

    def to_dict(self) -> dict[str, float]:
        """The counts, the shares ``fraction_clipped`` and ``fraction_skipped``, and five quantiles of the norm."""
        steps = max(self.steps, 1)
        shares = {"fraction_clipped": self.clipped / steps, "fraction_skipped": self.skipped / steps}
        quantiles = {f"norm_p{round(100 * q)}": self.quantile(q) for q in (0.01, 0.1, 0.5, 0.9, 0.99)}
        return {name: getattr(self, name) for name in (*_COUNTS, "largest")} | shares | quantiles

    def add(self, norm: float, coef: float, skip: bool) -> None:
        """Count one more step."""
        self.steps += 1
        if skip:
            self.skipped += 1
            self.current_skips += 1
            self.longest_skips = max(self.longest_skips, self.current_skips)
        else:
            self.current_skips = 0
            self.clipped += coef < 1
        if not isfinite(norm):
            self.nonfinite += 1
            return
        self._norms[_bucket(norm)] += 1
        if norm > self.largest:
            self.largest, self.largest_step = norm, self.steps

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and a tensor whose shape never changes, as checkpoints that load in place need."""
        norms = torch.zeros(SIZE, dtype=torch.int64)
        for bucket, times in self._norms.items():
            norms[bucket + FARTHEST + 1] = times
        return {name: getattr(self, name) for name in (*_COUNTS, "largest")} | {"norms": norms}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "History":
        """What :meth:`state_dict` returned; ValueError for anything else."""
        state = with_keys(state, (*_COUNTS, "largest", "norms"), "a Clipper's history")
        counts = {name: count(f"state history {name}", state[name]) for name in _COUNTS}
        norms, largest = state["norms"], state["largest"]
        if not is_dense(norms) or norms.shape != (SIZE,) or norms.dtype != torch.int64 or norms.min() < 0:
            raise ValueError(f"state history norms must be a dense tensor of {SIZE} counts, int64")
        if not isinstance(largest, float) or not 0 <= largest < inf:
            raise ValueError(f"state history largest must be a finite norm, got {largest!r}")
        norms = norms.cpu()
        found = Counter({k - FARTHEST - 1: int(norms[k]) for k in norms.nonzero().view(-1).tolist()})
        return cls(**counts, largest=largest, _norms=found)


class Recorder:
    """Keeps the :class:`History` of one Clipper, whose reports may be on an accelerator.

    These are kept as they are, without a kernel, until there are 256; then they travel to the host together, and are
    read when the next 256 are there, so that nobody waits.
    """

    __slots__ = ("_history", "_kept", "_travelling")

    def __init__(self) -> None:
        self.begin_anew(History())

    def begin_anew(self, history: History) -> None:
        """Go on from ``history``."""
        self._history = history
        self._kept: list[Report] = []
        self._travelling: Transfer | None = None

    def add(self, norm: float, coef: float, skip: bool) -> None:
        """Count a step that the host knows."""
        self._history.add(norm, coef, skip)

    def keep(self, report: Report) -> None:
        """Count a step of which the host knows nothing yet; no host sync."""
        self._kept.append(report)
        if len(self._kept) == KEPT:
            self._receive()
            self._travelling, self._kept = Transfer.begin(_row(self._kept)), []

    def read(self) -> History:
        """A copy of the history up to now: one host sync if anything of it is on an accelerator."""
        self._receive()
        if self._kept:
            self._count_all(_row(self._kept).tolist())
            self._kept = []
        return replace(self._history, _norms=self._history._norms.copy())

    def _receive(self) -> None:
        if self._travelling is not None:
            self._count_all(self._travelling.read())
            self._travelling = None

    def _count_all(self, numbers: list[float]) -> None:
        for norm, coef, skip in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
            self._history.add(norm, coef, bool(skip))


def _row(reports: list[Report]) -> Tensor:
    """Three numbers of each, on their device, (3 * reports,) float64."""
    kinds = ([report.norm for report in reports], [report.coef for report in reports], [r.skip for r in reports])
    return torch.stack([torch.stack(numbers).double() for numbers in kinds], dim=1).view(-1)


def _bucket(norm: float) -> int:
    if norm == 0:
        return -FARTHEST - 1
    return min(max(ceil(log(norm) / STEP), -FARTHEST), FARTHEST)


def _middle(bucket: int) -> float:
    """The number that no norm of a bucket is farther from than ``ERROR`` allows."""
    if bucket < -FARTHEST:
        return 0.0
    return 2 * exp(bucket * STEP) / (1 + exp(STEP))
