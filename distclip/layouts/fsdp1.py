"""FSDP1: the pieces behind FullyShardedDataParallel. Private torch API, read in 2.13: ``_handle``, its flat parameter.

FSDP1 flattens the parameters of a module into one, cuts that over a process group, and shows plain tensors: flat ones,
or, with ``use_orig_params=True``, this rank's part of each parameter. Nothing on them says what is missing.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from .outputs import layers_of, output_dims
from .piece import Held, Piece, Spec


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 manages ``parameter``, flat or original."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def is_whole(parameter: Tensor) -> bool:
    """Whether ``parameter`` is a flat one that every rank of its group holds whole, as with NO_SHARD.

    Known once a forward has run. With ``use_orig_params=True`` it cannot be known from a parameter.
    """
    flat: Any = parameter
    if not getattr(flat, "_is_flat_param", False) or not hasattr(flat, "_local_shard"):
        return False
    if hasattr(flat, "_padded_unsharded_size") or any(flat._param_extensions):  # cut here, or by tensor parallel before
        return False
    return bool(flat._sharded_size == flat._unpadded_unsharded_size)


def held_by_fsdp1(module: FullyShardedDataParallel, prefix: str) -> Iterator[Held]:
    """The pieces of ``module`` itself (not of nested FSDP modules), in the order of its flat parameter."""
    handle = module._handle
    if handle is None:
        return
    flat, layers = handle.flat_param, layers_of(module)
    ranks = tuple(dist.get_process_group_ranks(handle.process_group)) if handle.uses_sharded_strategy else ()
    for i, info in enumerate(flat._shard_param_infos):
        extension = flat._param_extensions[i]  # the DTensorSpec of a parameter that was cut by tensor parallel before
        start, here = info.offset_in_shard or 0, info.numel_in_shard or 0
        holder = flat if flat._params is None else flat._params[i]
        shape = flat._shapes[i] if extension is None else extension.shape
        piece = Piece(
            name=f"{prefix}{flat._fqns[i]}",
            shape=flat._sharded_size if flat._params is None else torch.Size([here]),  # as it is after a backward
            dtype=holder.dtype,
            device=holder.device,
            is_dtensor=False,
            here=here,
            global_shape=shape,
            span=slice(start, start + here) if flat._params is None else None,
            spec=None if extension is None else Spec(extension.mesh, extension.placements),
            flat_over=ranks,
            flattened=flat._shapes[i],
            start=info.intra_param_start_idx or 0,
            strides=() if flat._contiguities[i] else tuple(flat._strides[i]),  # FSDP1 flattens memory as it is
            row_dims=output_dims(layers[flat._param_infos[i].module], shape),
            aligned=not any(flat._param_extensions),  # tensor-parallel neighbours may have other sizes on other ranks
        )
        yield Held(piece, holder)
