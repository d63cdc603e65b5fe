"""Whether the backend does what it is asked: the collectives of distclip and of the wrappers, and their latency."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.doctor.finding import Finding
from distclip.doctor.meeting import Record
from distclip.doctor.place import Site
from distclip.doctor.refusals import ranks
from distclip.ranks.connections import all_reduce
from distclip.ranks.group import ClippingGroup

ROUNDS = 200


def summed(site: Site) -> tuple[Tensor, Tensor]:
    found = torch.tensor([1.0, site.place.rank], dtype=torch.float64, device=site.device)
    dist.all_reduce(found)
    return found, found.new_tensor([site.world, site.world * (site.world - 1) / 2])


def largest(site: Site) -> tuple[Tensor, Tensor]:
    found = torch.tensor([site.place.rank, -site.place.rank], device=site.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found, found.new_tensor([site.world - 1, 0])


def gathered(site: Site) -> tuple[Tensor, Tensor]:
    found = [torch.zeros(1, device=site.device) for _ in range(site.world)]
    dist.all_gather(found, found[0].new_tensor([site.place.rank]))
    return torch.cat(found), torch.arange(site.world, device=site.device).float()


def scattered(site: Site) -> tuple[Tensor, Tensor]:
    found, numbers = torch.zeros(1, device=site.device), torch.arange(site.world, device=site.device).float()
    dist.reduce_scatter(found, list(torch.split(numbers, 1)))
    return found, found.new_tensor([site.world * site.place.rank])


def by_distclip(site: Site) -> tuple[Tensor, Tensor]:
    """On connections of its own, where the message is on the host."""
    found = all_reduce(ClippingGroup.of(None), torch.ones(2, dtype=torch.float64, device=site.device))
    return found, torch.full_like(found, site.world)


COLLECTIVES: dict[str, Callable[[Site], tuple[Tensor, Tensor]]] = {
    "all_reduce of float64": summed,
    "all_reduce by MAX of int64": largest,
    "all_gather": gathered,
    "reduce_scatter": scattered,
    "distclip's all-reduce": by_distclip,
}


def run(site: Site) -> Record:
    """Every collective once."""
    wrong = {}
    for name, collective in COLLECTIVES.items():
        found, right = collective(site)
        if not torch.equal(found, right):
            wrong[name] = f"{found.tolist()}, not {right.tolist()}"
    return {"wrong": wrong}


def judge(name: str, records: Sequence[Record]) -> Finding:
    wrong: dict[str, list[int]] = {}
    for rank, record in enumerate(records):
        for collective, said in record["wrong"].items():
            wrong.setdefault(f"{collective} gave {said}", []).append(rank)
    if wrong:
        text = "; ".join(f"{ranks(who)}: {said}" for said, who in wrong.items())
        return Finding(name=name, state="wrong", text=f"the backend is broken: {text}", ends=True)
    return Finding(name=name, text=f"right: {', '.join(COLLECTIVES)}")


def latency(site: Site) -> Record:
    """How long our all-reduce takes, in milliseconds, by how many float64 numbers it has."""
    return {str(n): milliseconds(site, n) for n in (2, 1024)}


def milliseconds(site: Site, numbers: int) -> float:
    """The median time until the host has the result."""
    group, message = ClippingGroup.of(None), torch.zeros(numbers, dtype=torch.float64, device=site.device)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        all_reduce(group, message)[0].item()
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def judge_latency(name: str, records: Sequence[Record]) -> Finding:
    slowest = {n: max(record[n] for record in records) for n in records[0]}
    shown = ", ".join(f"{ms:.2g} ms of {n} numbers" for n, ms in slowest.items())
    return Finding(name=name, text=f"our all-reduce takes {shown} (medians)", facts={"all_reduce_ms": slowest})
