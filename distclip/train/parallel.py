"""The parallel wrappers a config can choose from."""

from typing import Literal

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distclip.train.place import Place
from distclip.train.problem import require


def check_strategy(strategy: str, world: int) -> None:
    require(
        strategy != "none" or world == 1,
        "parallel.strategy",
        f"none would train {world} models that never meet: use ddp or fsdp2, or parallel.processes=1",
    )


def spread(model: nn.Module, strategy: Literal["ddp", "fsdp2", "none"], place: Place) -> nn.Module:
    """The model on this rank's device, wrapped. FSDP2 shards `model.blocks` one by one where there are such."""
    model = model.to(place.device)
    if strategy == "ddp":
        device_ids = [place.device] if place.device.type == "cuda" else None
        # Bucket views lie otherwise in the first step of a process than in all others, and would be summed in another
        # order: a resumed run could differ from an uninterrupted one in a last bit.
        return DistributedDataParallel(model, device_ids=device_ids)
    if strategy == "fsdp2":
        mesh = init_device_mesh(place.device.type, (place.world,))
        for block in getattr(model, "blocks", ()):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model
