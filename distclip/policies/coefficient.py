"""The coefficient as factors for gradients, and coefficient and norm as a report shows them."""

from math import frexp, inf, isfinite, ldexp

import torch
from torch import Tensor

LEAST = torch.finfo(torch.float32).smallest_normal  # 2**-126; smaller ones lose precision, or are taken for 0
MOST = 1 / LEAST  # an optimizer that folds divides by the inverse


def clip_coef(norm: float, max_norm: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """``min(1, max_norm / (norm + 1e-6))`` as in torch, 0-d; 1 if max_norm is inf.

    ``dtype``: float32, or float64 for float64 gradients, whose norms leave the range of float32.
    """
    factor = max_norm / (norm + 1e-6)
    return torch.scalar_tensor(1.0 if factor > 1.0 or max_norm == inf else factor, dtype=dtype)


def clip_coef_on_device(norm: Tensor, max_norm: float, dtype: torch.dtype) -> Tensor:
    """The same for a norm on an accelerator and a finite bound; at least ``LEAST``, since the host does not know
    whether several factors are needed (:func:`factors`).
    """
    bound = torch.scalar_tensor(max_norm, dtype=torch.float64)  # of the host: an argument of the kernel, never a copy
    coef = torch.empty((), dtype=dtype, device=norm.device)
    return torch.div(bound, norm + 1e-6, out=coef).clamp_(LEAST, 1.0)


def rounded(coef: Tensor, dtype: torch.dtype) -> Tensor:
    """A coefficient on an accelerator in ``dtype``, from ``LEAST`` to ``MOST``."""
    least = torch.scalar_tensor(LEAST, dtype=torch.float64)
    return torch.maximum(coef, least, out=torch.empty((), dtype=dtype, device=coef.device)).clamp_(max=MOST)


def factors(norm: float, max_norm: float, coef: float | None, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The coefficient as a report shows it, 0-d, and the factors for gradients, applied one after the other.

    The coefficient is ``coef``, or :func:`clip_coef` for None. Factors: none if it is 1, itself if it lies between
    ``LEAST`` and ``MOST``. Others would lose precision, or make zeros or infinities of finite gradients: they become
    several factors, and what is shown is neither 0 nor inf.
    """
    shown = clip_coef(norm, max_norm, dtype) if coef is None else presented(coef, dtype)
    number = shown.item()
    if number == 1.0:
        return shown, ()
    if not (number < LEAST or number > MOST) or not isfinite(norm):
        return shown, (shown,)
    over, under = (max_norm, norm + 1e-6) if coef is None else (coef, 1.0)
    parts = tuple(torch.scalar_tensor(part, dtype=dtype) for part in _normal_parts(over, under))
    return torch.full_like(shown, torch.finfo(dtype).smallest_normal) if number == 0.0 else shown, parts


def _normal_parts(over: float, under: float) -> list[float]:
    """Numbers from ``LEAST`` to ``MOST`` whose product is ``over / under``: first powers of two, which are exact."""
    (high, exponent), (low, taken) = frexp(over), frexp(under)
    rest, exponent = high / low / 2, exponent - taken + 1  # the rest is between 1/4 and 1
    parts = []
    while exponent < -124:
        parts.append(LEAST)
        exponent += 126
    while exponent > 126:
        parts.append(MOST)
        exponent -= 126
    return [*parts, ldexp(rest, exponent)]


def presented(norm: float, dtype: torch.dtype) -> Tensor:
    """``norm`` in ``dtype`` (float32 or float64); a finite number stays finite: beyond float32 it is ``finfo.max``."""
    most = torch.finfo(dtype).max
    return torch.scalar_tensor(most if most < norm < inf else norm, dtype=dtype)


def all_presented(norms: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for many, on any device, without a host sync."""
    return norms.clone() if dtype == norms.dtype else presented_on_device(norms, norms < inf, dtype)


def presented_on_device(norm: Tensor, finite: Tensor, dtype: torch.dtype) -> Tensor:
    """The same on any device, in new memory; ``finite``: bool like ``norm``, whether the norm is finite."""
    most = torch.scalar_tensor(torch.finfo(dtype).max, dtype=torch.float64)
    shown = torch.minimum(norm, most, out=torch.empty_like(norm, dtype=dtype))
    return shown.div_(finite)  # by 1, or by 0 what was inf and is the largest number now
