"""1-D views of tensors of any strides, without copying what can be viewed."""

from collections.abc import Iterator

from torch import Tensor

COPY = 1 << 16  # elements of a copy where no view exists


def flat_views(tensor: Tensor) -> Iterator[Tensor]:
    """Yield contiguous 1-D tensors that hold each element of ``tensor`` once, in no particular order.

    One view when the elements lie densely in memory (any order of dimensions, so channels-last and transposes too).
    Otherwise slices along the largest dimension, copied at most ``COPY`` elements at a time.
    """
    if tensor.is_contiguous():
        yield tensor.view(-1)
        return
    dense = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    if dense.is_contiguous():
        yield dense.view(-1)
    elif tensor.numel() <= COPY:
        yield tensor.contiguous().view(-1)
    else:
        dim = max(range(tensor.ndim), key=tensor.size)
        for half in tensor.tensor_split(2, dim):
            yield from flat_views(half)
