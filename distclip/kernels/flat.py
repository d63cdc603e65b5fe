"""Views of tensors of any strides, without copying what can be viewed."""

from collections.abc import Iterator

from torch import Tensor

COPY = 1 << 16  # elements of a copy where no view exists


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements are contiguous in memory, in any order of dimensions."""
    return tensor.is_contiguous() or _in_order_of_memory(tensor).is_contiguous()


def bounded(tensor: Tensor, most: int) -> Iterator[Tensor]:
    """Yield views of at most ``most`` elements, of any strides, that hold each element once."""
    if tensor.numel() <= most:
        yield tensor
    else:
        for half in tensor.tensor_split(2, max(range(tensor.ndim), key=tensor.size)):
            yield from bounded(half, most)


def flat_views(tensor: Tensor) -> Iterator[Tensor]:
    """Yield contiguous 1-D tensors that hold each element of ``tensor`` once, in no particular order.

    One view if the elements are dense in memory (in any order of dimensions: channels-last, transposes). Otherwise
    slices along the largest dimension, copied at most ``COPY`` elements at a time.
    """
    if tensor.is_contiguous():
        yield tensor.view(-1)
        return
    dense = _in_order_of_memory(tensor)
    if dense.is_contiguous():
        yield dense.view(-1)
    elif tensor.numel() <= COPY:
        yield tensor.contiguous().view(-1)
    else:
        dim = max(range(tensor.ndim), key=tensor.size)
        for half in tensor.tensor_split(2, dim):
            yield from flat_views(half)


def _in_order_of_memory(tensor: Tensor) -> Tensor:
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
