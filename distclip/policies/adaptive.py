"""What policies that learn from norms have in common. Tensors have the units' dimensions first; nothing here syncs."""

from math import inf

import torch
from torch import Tensor

LEAST = torch.finfo(torch.float64).smallest_normal
MOST = torch.finfo(torch.float64).max
NORMAL = 1.4826  # times the median of absolute deviations is the standard deviation of normal numbers


def learnt_from(norm: Tensor, below: float = inf) -> Tensor:
    """Whether a norm is learnt from: those of steps without gradients (0), NaN, and from ``below`` on are not."""
    return torch.logical_and(norm, norm < below)


def coef_to(bound: Tensor, norm: Tensor) -> Tensor:
    """By what gradients are multiplied whose norm has this bound: exactly 1 up to it, and else ``bound / norm``.

    The 1e-6 of torch's formula would clip small norms at their own bound.
    """
    return (bound / torch.minimum(norm, number(MOST))).clamp_(LEAST, 1.0)


def at_most(bound: Tensor, max_norm: float) -> Tensor:
    return bound.clamp(max=max_norm) if max_norm < inf else bound


def moved_on(window: Tensor, value: Tensor, where: Tensor) -> Tensor:
    """``window``, (..., length), with ``value`` in place of its oldest entry, the first, ``where`` that holds."""
    return torch.where(where.unsqueeze(-1), torch.cat([window[..., 1:], value.unsqueeze(-1)], -1), window)


def winsorised(window: Tensor, sigma: float) -> Tensor:
    """``window`` with entries that are more than ``sigma`` deviations from its median at that distance.

    The deviation is 1.4826 times the median of absolute ones. Medians are the lower ones.
    """
    center = _median(window)
    reach = sigma * NORMAL * _median((window - center).abs())
    return torch.clamp(window, center - reach, center + reach)


def number(value: float) -> Tensor:
    """A host number: an argument of the kernel, never a copy."""
    return torch.scalar_tensor(value, dtype=torch.float64)


def _median(window: Tensor) -> Tensor:
    half = (window.shape[-1] - 1) // 2
    return window.sort(-1).values[..., half : half + 1]
