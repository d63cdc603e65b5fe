"""The table as text, line by line, so that each line can be shown when its case is done."""

from collections.abc import Sequence

from distclip.bench.case import Case
from distclip.bench.result import Result

LINE = "{:<{width}}  {:>7}  {:>16}  {:>7}  {:<6}  {}"


def heading(width: int) -> str:
    return LINE.format("case", "ratio", "quartiles", "goal", "", "medians", width=width)


def line(result: Result, width: int) -> str:
    """One case: the ratio of the first two medians, and the others behind them."""
    case = result.case
    if result.ratio is None or result.low is None or result.high is None:
        return LINE.format(case.name, "-", "", case.wanted, "", result.note, width=width)
    met = {True: "met", False: "missed", None: ""}[case.met(result.ratio)]
    between = f"{figure(result.low)} .. {figure(result.high)}"
    return LINE.format(case.name, figure(result.ratio), between, case.wanted, met, medians(result), width=width)


def medians(result: Result) -> str:
    over = result.case.over
    others = [name for name in result.medians if name not in over]
    above, below, *rest = (f"{name} {figure(result.medians[name])} {result.case.unit}" for name in [*over, *others])
    return ", ".join([f"{above} / {below}", *rest])


def figure(value: float) -> str:
    """Three significant digits, and all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def listing(cases: Sequence[Case]) -> str:
    """Every case with its goal and what it is."""
    width = max(len(case.name) for case in cases)
    return "\n".join(f"{case.name:<{width}}  {case.wanted:>7}  {case.what}" for case in cases)
