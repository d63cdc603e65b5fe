"""This process's place among the ranks that measure."""

import os
import socket
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(kw_only=True, slots=True, frozen=True)
class Place:
    """``alone``: a group of rank 0 only, for cases of one process."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    alone: dist.ProcessGroup

    @classmethod
    def join(cls, meeting: str, rank: int, world: int, device: torch.device) -> Self:
        """Join the process group at ``meeting``, an init_method: NCCL for CUDA devices, Gloo for the CPU."""
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # ranks share the cores already
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", meeting, rank=rank, world_size=world, device_id=device)
        else:
            dist.init_process_group("gloo", meeting, rank=rank, world_size=world)
        return cls.here(device)

    @classmethod
    def here(cls, device: torch.device) -> Self:
        """The place in the process group that this process has already joined."""
        world = dist.get_world_size()
        mesh, alone = init_device_mesh(device.type, (world,)), dist.new_group([0])
        return cls(rank=dist.get_rank(), world=world, device=device, mesh=mesh, alone=alone)


def launched() -> bool:
    """Whether torchrun or a similar launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def shows() -> bool:
    """Whether this process shows the results and writes them."""
    return os.environ.get("RANK", "0") == "0"


def reports_errors() -> bool:
    """Whether this process reports errors for its machine, whose ranks all find the same."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def join_launched(kind: str) -> Place:
    """Join the launcher's ranks on this kind of device."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return Place.join("env://", rank, world, device_of(kind, int(os.environ.get("LOCAL_RANK", "0"))))


def join_local(folder: str, rank: int, world: int, kind: str) -> Place:
    """Join ranks of this machine only: they meet in a private folder and communicate over loopback."""
    loopback = next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    return Place.join(f"file://{folder}/ranks", rank, world, device_of(kind, rank))


def device_of(kind: str, local_rank: int) -> torch.device:
    return torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
