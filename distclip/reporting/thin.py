"""Fewer points, the same picture: of each bucket of steps the lowest and the highest stay, so that no spike is lost."""

import numpy as np

from distclip.runs.run import Floats, Steps


def thinned(values: Floats, most: int) -> Steps:
    """The places of at most ``most`` values, ascending: all, or the extremes of buckets, the first and the last.

    ``values``: (n,) finite. ``most``: at least 4.
    """
    size = -(-len(values) // max(1, (most - 2) // 2))
    if len(values) <= most:
        return np.arange(len(values))
    whole = len(values) // size * size
    buckets = values[:whole].reshape(-1, size)
    first = np.arange(0, whole, size)
    kept = [first + buckets.argmin(1), first + buckets.argmax(1), np.array([0, len(values) - 1])]
    if whole < len(values):
        kept.append(whole + np.array([values[whole:].argmin(), values[whole:].argmax()]))
    return np.unique(np.concatenate(kept))
