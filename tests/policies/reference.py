"""The policies on a norm once more, from their papers: one process, plain Python numbers, no line of the package.

Each takes rows of numbers, the norm of a step first, and gives (bound, coef, skip) of each step.
"""

from collections.abc import Callable, Iterable, Sequence
from math import cos, exp, inf, isfinite, nan, pi, sqrt
from statistics import median_low

Row = Sequence[float]
Answer = tuple[float, float, bool]


def hard(bound: float, norm: float) -> float:
    return bound / norm if norm > bound else 1.0


def usable(norm: float) -> bool:
    return isfinite(norm) and norm > 0


def scheduled(bound: Callable[[int], float]) -> Callable[[Iterable[Row]], list[Answer]]:
    def run(rows: Iterable[Row]) -> list[Answer]:
        answers, made = [], 0
        for (norm,) in rows:
            answers.append((bound(made), min(1.0, bound(made) / (norm + 1e-6)), False))
            made += isfinite(norm)
        return answers

    return run


def warmup(start: float, end: float, steps: int) -> Callable[[int], float]:
    return lambda step: end if step >= steps else start + (end - start) * step / steps


def cosine(start: float, end: float, steps: int) -> Callable[[int], float]:
    return lambda step: end + (start - end) * (1 + cos(pi * min(step, steps) / steps)) / 2


def smooth(rows: Iterable[Row], max_norm: float) -> list[Answer]:
    return [(max_norm, max_norm / (norm + max_norm), False) for (norm,) in rows]


def normalize(rows: Iterable[Row], target: float) -> list[Answer]:
    return [(target, target / norm if norm else 1.0, False) for (norm,) in rows]


def autoclip(rows: Iterable[Row], percentile: float, window: int) -> list[Answer]:
    """Equation 2 of the paper, over a window."""
    answers: list[Answer] = []
    seen: list[float] = []
    for (norm,) in rows:
        seen = [*seen, norm][-window:] if usable(norm) else seen
        place = (len(seen) - 1) * percentile / 100
        ordered = [*sorted(seen), inf]
        low = ordered[int(place)] if seen else inf
        bound = low if place == int(place) else low + (ordered[int(place) + 1] - low) * (place - int(place))
        answers.append((bound, hard(bound, norm), False))
    return answers


def quantile_tracker(rows: Iterable[Row], quantile: float, eta: float, max_norm: float = inf) -> list[Answer]:
    """Section 2.1: C <- C exp(-eta (b - gamma)) for the share b of norms up to C, here of one norm."""
    answers: list[Answer] = []
    bound = inf
    for (norm,) in rows:
        first = bound == inf and usable(norm)
        bound = norm if first else bound
        limit = min(bound, max_norm)
        answers.append((limit, hard(limit, norm), False))
        if usable(norm) and not first:
            bound *= exp(-eta * ((1 if norm <= bound else 0) - quantile))
    return answers


def winsorised(numbers: Sequence[float], sigma: float) -> list[float]:
    center = median_low(numbers)
    reach = sigma * 1.4826 * median_low([abs(x - center) for x in numbers])
    return [min(max(x, center - reach), center + reach) for x in numbers]


def zclip(
    rows: Iterable[Row],
    alpha: float = 0.97,
    z_thresh: float = 2.5,
    max_norm: float = 1.0,
    eps: float = 1e-6,
    warmup_steps: int = 25,
    fixed: bool = True,
) -> list[Answer]:
    """Algorithm 1; ``fixed``: with the repairs that are the package's own."""
    answers: list[Answer] = []
    mean = var = nan
    raw: list[float] = []
    outliers = 0
    for (norm,) in rows:
        if len(raw) < warmup_steps:
            answers.append((max_norm, hard(max_norm, norm), False))
            raw += [norm] if usable(norm) else []
            if len(raw) == warmup_steps:
                mean, var = moments(winsorised(raw, z_thresh) if fixed else raw)
            continue
        deviation = sqrt(var)
        z = (norm - mean) / (deviation + eps * (mean if fixed else 1.0))
        bound = mean + z_thresh * deviation / (z / z_thresh) if z > z_thresh else inf
        limit = min(bound, max_norm)
        answers.append((limit, hard(limit, norm), False))
        if usable(norm):
            raw, outliers = [*raw[1:], norm], outliers + 1 if bound < inf else 0
            x = min(norm, bound)
            mean = alpha * mean + (1 - alpha) * x
            var = alpha * var + (1 - alpha) * (x - mean) ** 2
            if fixed and outliers == warmup_steps:
                (mean, var), outliers = moments(winsorised(raw, z_thresh)), 0
    return answers


def moments(numbers: Sequence[float]) -> tuple[float, float]:
    mean = sum(numbers) / len(numbers)
    return mean, sum((x - mean) ** 2 for x in numbers) / len(numbers)


def skip_spikes(
    rows: Iterable[Row],
    max_norm: float = inf,
    sigma: float = 6.0,
    window: int = 128,
    patience: int = 16,
    signals_only: bool = False,
) -> list[Answer]:
    """OLMo-core's rule, one-sided, with winsorised records and patience."""
    answers: list[Answer] = []
    columns: list[list[float]] = []
    latest: list[list[float]] = []
    recorded = skips = 0
    begins = max(2, window // 2)
    for row in rows:
        norm, now = row[0], row[1:] if signals_only else row
        columns, latest = columns or [[] for _ in now], latest or [[] for _ in now]
        if not isfinite(norm):
            answers.append((inf, 1.0, False))
            continue
        if not all(map(isfinite, now)):
            answers.append((inf, 1.0, True))
            continue
        limits = [(-inf, inf)] * len(now)
        if recorded >= begins:
            limits = [limits_of(column, sigma) for column in columns]
        spike = any(x > high for x, (_, high) in zip(now, limits, strict=True))
        answers.append((inf, 1.0, spike or norm > max_norm))
        if norm == 0:
            continue
        recorded += 1
        skips = skips + 1 if spike else 0
        limited = [min(max(x, low), high) for x, (low, high) in zip(now, limits, strict=True)]
        columns = [[*column, x][-window:] for column, x in zip(columns, limited, strict=True)]
        latest = [[*column, x][-patience:] for column, x in zip(latest, now, strict=True)]
        if recorded == begins:
            columns = [winsorised(column, sigma) for column in columns]
        if skips == patience:
            columns, skips = [winsorised(column, sigma) for column in latest], 0
    return answers


def limits_of(column: Sequence[float], sigma: float) -> tuple[float, float]:
    mean = sum(column) / len(column)
    deviation = sqrt(sum((x - mean) ** 2 for x in column) / (len(column) - 1))
    reach = sigma * max(deviation, 1e-6 * abs(mean))
    return mean - reach, mean + reach
