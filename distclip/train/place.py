"""This process's rank and device, and the backend of its collectives."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from distclip.ranks.lost_ranks import MEETING_POINT
from distclip.train.config import Parallel
from distclip.train.problem import require

MEETING = 600.0  # seconds to wait at least for all ranks to start


@dataclass(kw_only=True, slots=True, frozen=True)
class Place:
    rank: int
    world: int
    device: torch.device
    backend: str


def launched() -> bool:
    """Whether torchrun or a similar launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def number_in(name: str) -> int:
    """The number in a launcher's environment variable."""
    text = os.environ[name]
    number = len(text) < 10 and text.isascii() and text.isdecimal()
    require(number, name, f"a launcher puts a number there, not {text!r}: unset it, or start by a launcher")
    return int(text)


def launched_world(parallel: Parallel) -> int:
    """The launcher's number of ranks, which counts, but must not be smaller than asked for."""
    world = number_in("WORLD_SIZE")
    require(number_in("RANK") < world, "RANK", f"{os.environ['RANK']} is not one of WORLD_SIZE={world} ranks")
    require(
        parallel.processes <= world,
        "parallel.processes",
        f"asks for {parallel.processes} but the launcher started {world}: set it to {world} or start more",
    )
    return world


def check_device(parallel: Parallel, world: int) -> None:
    """Check that this machine has the GPUs that are asked for; of `world` ranks all are here if no launcher says so."""
    here, gpus = processes_here(world), torch.cuda.device_count()
    require(
        parallel.device != "cuda" or (dist.is_nccl_available() and gpus >= here),
        "parallel.device",
        f"cuda: {here} processes need as many GPUs, this machine has {gpus or 'none'}: set it to cpu or auto",
    )


def processes_here(world: int) -> int:
    return number_in("LOCAL_WORLD_SIZE") if launched() and "LOCAL_WORLD_SIZE" in os.environ else world


def join(timeout: float, asked: str) -> Place:
    """Join the process group: NCCL if each local rank has a GPU and no CPU is asked for, otherwise Gloo on the CPU.

    A rank that waits for another for more than `timeout` seconds gets an error, except here, since machines may start
    late.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world = processes_here(world)
    init_method, limit = meeting_point(), timedelta(seconds=max(timeout, MEETING))
    if asked != "cpu" and dist.is_nccl_available() and torch.cuda.device_count() >= local_world:
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
        dist.init_process_group(backend, init_method, limit, world, rank, device_id=device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        torch.set_flush_denormal(True)  # the tails of saturated recurrent nets make a CPU ten times slower
        dist.init_process_group(backend, init_method, limit, world, rank)
    limit_waits(timeout)
    return Place(rank=rank, world=world, device=device, backend=backend)


def meeting_point() -> str:
    """Where ranks meet: a new place for every restart by our launcher."""
    ours = os.environ.get(MEETING_POINT)
    return "env://" if ours is None else f"{ours}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def limit_waits(timeout: float) -> None:
    """Set the timeout in seconds of all groups: those of mesh axes have torch's default, half an hour with Gloo.

    Private torch API, 2.13: the list of groups and the setter.
    """
    for group in _world.pg_map:
        _set_pg_timeout(timedelta(seconds=timeout), group)


def from_rank_0(number: int, place: Place) -> int:
    """Rank 0's number on every rank, by one broadcast: for what ranks may see differently, as clocks and disks."""
    box = torch.tensor(number, dtype=torch.int64, device=place.device)
    dist.broadcast(box, src=0)
    return int(box)
