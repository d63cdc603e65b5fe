"""The two errors of the library: each says what, which parameter, rank or field, and what to do about it."""

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
"""What a user's ``layout``, tensor subclasses and torch itself may raise on one rank while the others go on."""


class LayoutError(ValueError):
    """The gradients' layout is unknown, unsupported, or not the same on all ranks: no norm can be trusted."""


class NonFiniteError(RuntimeError):
    """The total norm is not finite; the message names the parameter, the rank, and whether it was NaN or inf."""
