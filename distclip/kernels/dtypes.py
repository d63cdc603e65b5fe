"""Which numbers gradients are made of, and what is asked of many tensors at once."""

from operator import attrgetter

import torch
from torch import Tensor

REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)
NUMBERS = frozenset(REAL + COMPLEX)
WIDE = (torch.float64, torch.complex128)

# Mapped over a list these take 20 ns a tensor, a comprehension 30.
dtype_of = attrgetter("dtype")
size_in_bytes = attrgetter("nbytes")


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs, a view of one dimension more; the tensor itself where it is real."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
