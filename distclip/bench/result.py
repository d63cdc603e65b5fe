"""The result of a case: the median of the rounds' ratios, never a ratio of two medians."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

from distclip.bench.case import Case


@dataclass(kw_only=True, slots=True, frozen=True)
class Result:
    """``medians`` are in the case's unit; ``low`` and ``high`` are the quartiles of the ratios.

    ``note``: why there is no figure, if there is none.
    """

    case: Case
    medians: Mapping[str, float] = field(default_factory=dict)
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        case = self.case
        return {
            "case": case.name,
            "what": case.what,
            **{f"{name}_{case.unit}": value for name, value in self.medians.items()},
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "rounds": self.rounds,
            "over": list(case.over),
            "goal": case.goal,
            "at_most": case.at_most,
            "met": None if self.ratio is None else case.met(self.ratio),
            "note": self.note,
        }


def summary(case: Case, quantities: Mapping[str, Sequence[float]]) -> Result:
    """The result from what each call took in each round."""
    above, below = (quantities[name] for name in case.over)
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    low, high = quartiles(ratios)
    medians = {name: median(values) for name, values in quantities.items()}
    return Result(case=case, medians=medians, ratio=median(ratios), low=low, high=high, rounds=len(ratios))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and upper quartile; of one value, itself twice."""
    low, _, high = quantiles(values if len(values) > 1 else [*values, *values], n=4, method="inclusive")
    return low, high
