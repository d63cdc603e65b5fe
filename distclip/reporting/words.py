"""Numbers as they are read: three digits, and shares in percent."""

import math


def short(number: float) -> str:
    """A number with three digits: 0.0123, 1.5, 48,200."""
    if not math.isfinite(number):
        return "NaN" if math.isnan(number) else "inf" if number > 0 else "-inf"
    return f"{float(f'{number:.3g}'):,.0f}" if 1000 <= abs(number) < 1e7 else f"{number:.3g}"


def percent(share: float) -> str:
    """A share with as many digits as tell it from none and from all."""
    if share in (0, 1) or 0.0995 <= share <= 0.9905:
        return f"{100 * share:.0f} %"
    if 5e-6 <= share <= 1 - 5e-6:
        return f"{100 * share:.{1 if 0.00095 <= share <= 0.9994 else 3}f} %"
    return "< 0.001 %" if share < 0.5 else "> 99.999 %"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
