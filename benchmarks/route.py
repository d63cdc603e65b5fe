"""How often one call moves from one file of distclip to another: the way of a reader who follows it.

    OMP_NUM_THREADS=1 python benchmarks/route.py          # the table
    OMP_NUM_THREADS=1 python benchmarks/route.py --list   # and the routes, function by function

Measures the distclip that Python imports, whose folder is printed, by its public names only: `PYTHONPATH=<a checkout>`
measures another revision with the same file. Three calls on the CPU, after ten that warm up, each of which clips:
`Clipper.step` with fused AdamW and `clip_grad_norm_`, both on FSDP2 as rank 0 of two Gloo ranks sees them, and
`clip_grad_norm_` on plain tensors in one process.

The route is what Python's profiler reports: each function of a file in distclip as it is entered, a decorator's wrapper
as the function it is, a generator each time it goes on. Comprehensions are left out: to Python 3.11 they are functions,
to 3.12 they are not. *changes* counts neighbours on the route that lie in different files, *files* the distinct files,
*functions* the entries. **These are the figures of record.** *with returns* counts changes where returns are events
too, so that a call into another file and back is two changes even where the next call goes there again.

| revision | step | function on FSDP2 | function on plain tensors |
|---|---|---|---|
| 2f2e235, 2026-11-28 | 42 changes, 17 files (51 with returns) | 34, 17 (45) | 33, 15 (43) |
| 4517729, 2026-11-30 | 62 changes, 23 files (79 with returns) | 38, 20 (51) | 36, 17 (47) |
| 40bb07a, 2026-11-30 | 25 changes, 18 files (34 with returns) | 15, 14 (23) | 14, 12 (20) |

Python 3.11, torch 2.13.0, the compiled kernel. The checks of 2026-11-30 lie between the first two, the move into
packages between the last two.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

import distclip

HOME = f"{Path(distclip.__file__).parent}{os.sep}"
COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
WARM_UP, MEASURED = 10, 5  # calls 11 to 15: a Clipper compares gradients in calls 1, 2, 4, 8 and 16
BOUND = 1e-3  # below every norm here
HEAD = f"{'call':36} {'changes':>8} {'files':>6} {'functions':>10} {'with returns':>13}"


@dataclass(frozen=True, slots=True)
class Stop:
    file: str
    function: str
    is_entry: bool


@dataclass(frozen=True, slots=True)
class Route:
    stops: tuple[Stop, ...]

    @property
    def entries(self) -> list[Stop]:
        return [stop for stop in self.stops if stop.is_entry]

    @property
    def changes(self) -> int:
        return changes(self.entries)

    def line(self, name: str) -> str:
        files = len({stop.file for stop in self.entries})
        return f"{name:36} {self.changes:8} {files:6} {len(self.entries):10} {changes(self.stops):13}"

    def listed(self) -> Iterator[str]:
        """A line a function; its file where that changes."""
        before = ""
        for stop in self.entries:
            yield f"  {stop.file if stop.file != before else '':32} {stop.function}"
            before = stop.file


def changes(stops: Iterable[Stop]) -> int:
    return sum(one.file != other.file for one, other in pairwise(stops))


def route_of(call: Callable[[], object]) -> Route:
    stops: list[Stop] = []

    def note(frame, event: str, _) -> None:
        code = frame.f_code
        if event in ("call", "return") and code.co_filename.startswith(HOME) and code.co_name not in COMPREHENSIONS:
            stops.append(Stop(code.co_filename.removeprefix(HOME), code.co_qualname, event == "call"))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Route(tuple(stops))


def steady(model: nn.Module, call: Callable[[], object], optimizer: torch.optim.Optimizer | None = None) -> Route:
    """The route of one steady call, that with the median of changes."""
    routes = []
    for step in range(WARM_UP + MEASURED):
        model(torch.randn(4, 16)).square().sum().backward()
        if step < WARM_UP:
            call()
        else:
            routes.append(route_of(call))
        model.zero_grad()
    middle = statistics.median_low(route.changes for route in routes)
    return next(route for route in routes if route.changes == middle)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)))


def sharded() -> nn.Module:
    model = net()
    for block in model:
        fully_shard(block)
    return fully_shard(model)


def on_fsdp2(rank: int, meeting_point: str, listed: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(meeting_point, 2), rank=rank, world_size=2)
    model = sharded()
    clipper = distclip.Clipper(model, BOUND)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = steady(model, lambda: clipper.step(optimizer))
    model = sharded()
    function = steady(model, lambda: distclip.clip_grad_norm_(model.parameters(), BOUND))
    if rank == 0:
        show("Clipper.step, FSDP2, fused AdamW", step, listed)
        show("clip_grad_norm_, FSDP2", function, listed)
    dist.destroy_process_group()


def show(name: str, route: Route, listed: bool) -> None:
    print(route.line(name), *(route.listed() if listed else ()), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="how often one call moves from one file of distclip to another")
    parser.add_argument("--list", action="store_true", help="print the routes, function by function")
    listed = parser.parse_args().list
    torch.set_num_threads(1)
    print(f"{Path(distclip.__file__).parent}\n{HEAD}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_fsdp2, (f"{folder}/ranks", listed), nprocs=2)
    model = net()
    show(
        "clip_grad_norm_, plain tensors",
        steady(model, lambda: distclip.clip_grad_norm_(model.parameters(), BOUND)),
        listed,
    )


if __name__ == "__main__":
    main()
