"""Joining the ranks: first in the job's store, then in a process group on the device that is asked for."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from distclip.bench.place import Place, device_of, launched
from distclip.doctor.meeting import STARTING, Meeting
from distclip.train.place import limit_waits


@dataclass(kw_only=True, slots=True, frozen=True)
class Site:
    """This rank's place among those that are checked. ``timeout``: seconds that a collective may take."""

    place: Place
    timeout: float

    @property
    def world(self) -> int:
        return self.place.world

    @property
    def device(self) -> torch.device:
        return self.place.device

    def mesh(self, **sizes: int) -> DeviceMesh:
        """A mesh of all ranks by the names of its axes."""
        mesh = init_device_mesh(self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        limit_waits(self.timeout)  # torch gives its groups half an hour
        return mesh


def meet(url: str, rank: int, world: int, timeout: float, stopped: Callable[[], bool]) -> Meeting:
    """Meet the others in the store at ``url``, an init_method; RuntimeError where it cannot be reached."""
    limit = timedelta(seconds=max(timeout, STARTING))
    store, rank, world = next(rendezvous(url, rank, world, timeout=limit))
    store.set_timeout(timedelta(seconds=timeout))
    store = PrefixStore("distclip", store)
    return Meeting(store=store, rank=rank, world=world, timeout=timeout, stopped=stopped)


def join(meeting: Meeting, device: torch.device) -> Site:
    """Join the process group: NCCL for CUDA devices, Gloo for the CPU."""
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # ranks share the cores already
    dist.init_process_group(
        backend,
        store=PrefixStore("group", meeting.store),
        rank=meeting.rank,
        world_size=meeting.world,
        timeout=timedelta(seconds=meeting.timeout),
        device_id=bound,
    )
    place = Place.here(device)
    limit_waits(meeting.timeout)
    return Site(place=place, timeout=meeting.timeout)


def chosen_device(wish: str, local_rank: int, local_world: int) -> torch.device:
    """The device of this rank. ``auto``: a GPU, where each local rank has one of its own."""
    enough = dist.is_nccl_available() and torch.cuda.device_count() >= local_world
    return device_of(("cuda" if enough else "cpu") if wish == "auto" else wish, local_rank)


def local_place(rank: int, world: int) -> tuple[int, int]:
    """This rank's number among those of its machine, and how many these are."""
    if not launched():
        return rank, world
    return int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
