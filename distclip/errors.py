"""The two errors of the library: each says what, which parameter, rank or field, and what to do about it."""


class LayoutError(ValueError):
    """The gradients' layout is unknown, unsupported, or not the same on all ranks: no norm can be trusted."""


class NonFiniteError(RuntimeError):
    """The total norm is not finite; the message names the parameter, the rank, and whether it was NaN or inf."""
