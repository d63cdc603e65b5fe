"""Memory that no kernel may write: freed under its tensor, or shared with another."""

from collections.abc import Sequence

import torch
from torch import Tensor

LOW = 1 << 40  # an address below it may be an offset into memory that was freed


def check_memory(tensors: Sequence[Tensor], addresses: Sequence[int] | None = None, shared: bool = False) -> None:
    """RuntimeError if the memory of one of the ``tensors`` was freed, or two start at the same address. 60 ns each.

    Tensors that start inside others are not detected. ``shared``: they may start at the same address.
    """
    found = list(map(Tensor.data_ptr, tensors)) if addresses is None else addresses
    if not found:
        return
    if min(found) < LOW:
        for tensor, address in zip(tensors, found, strict=True):
            if address < LOW and tensor.is_cpu and tensor.numel() and not tensor.untyped_storage().data_ptr():
                raise RuntimeError(
                    f"a gradient of shape {tuple(tensor.shape)} has no memory: its storage was freed, and must be "
                    "there until its optimizer has stepped"
                )
    if not shared and len(set(found)) < len(found):
        _check_apart(tensors, found)


def _check_apart(tensors: Sequence[Tensor], addresses: Sequence[int]) -> None:
    seen: set[tuple[int, torch.device]] = set()
    for tensor, address in zip(tensors, addresses, strict=True):
        if not address or not tensor.numel():
            continue
        if (address, tensor.device) in seen:
            raise RuntimeError(
                f"a gradient of shape {tuple(tensor.shape)} shares memory with another, whose elements would be scaled "
                "twice: give each its own (p.grad = p.grad.clone())"
            )
        seen.add((address, tensor.device))
