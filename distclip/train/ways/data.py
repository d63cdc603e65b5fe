"""Data parallelism: DDP replicates a model over an axis, FSDP2 shards it."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel


def copy_by_ddp(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> nn.Module:
    device_ids = [device] if device.type == "cuda" else None
    # Bucket views lie otherwise in the first step of a process than in all others, and would be summed in another
    # order: a resumed run could differ from an uninterrupted one in a last bit.
    return DistributedDataParallel(model, device_ids=device_ids, process_group=mesh.get_group())


def shard_by_fsdp2(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
    """Shard `model.blocks` one by one, if there are any, then the rest; compute in `dtype`, reduce in float32."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    for block in getattr(model, "blocks", {}).values():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # in place


def autocast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Let the model's forward compute in `dtype` wherever autocast allows it."""
    model.forward = torch.autocast(device.type, dtype)(model.forward)
