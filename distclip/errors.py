"""The two errors of the library, and how it warns.

Messages say what is wrong, with which parameter, rank or field, and what to do.
"""

import sys
import warnings
from collections.abc import Sequence

FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a user's ``layout``, a tensor subclass or torch itself may raise on one rank while the others go on."""


class LayoutError(ValueError):
    """The gradients' layout is unknown, unsupported, or not the same on all ranks: no norm can be trusted."""


class NonFiniteError(RuntimeError):
    """The total norm is not finite; the message names the parameter, the rank, and whether it was NaN or inf."""


def warn_user(text: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warn at the line that called us: the first outside distclip, and outside torch, whose hooks may lie between."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("distclip", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


def and_more(names: Sequence[object], most: int = 5) -> str:
    """``names`` as errors list them, at most so many, and how many more there are.

    >>> and_more(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def counted(number: int, noun: str) -> str:
    """So many of them.

    >>> counted(1, "step"), counted(2000, "step")
    ('1 step', '2,000 steps')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """``text`` with line breaks and control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
