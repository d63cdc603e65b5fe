"""Rounds: each measures every call once on fresh gradients, in an order that rotates from round to round."""

import gc
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distclip.bench.case import Call, Case, Contest
from distclip.bench.place import Place
from distclip.bench.result import Result, summary

START = 2e-3  # seconds from the last rank's arrival to the common start
BOOT = Path("/proc/sys/kernel/random/boot_id")


def measure(case: Case, place: Place, rounds: int) -> Result | None:
    """The result of a case, the same on every rank that takes part; None on a rank that does not."""
    if case.alone and place.rank != 0:
        return None
    try:
        contest = case.build(place)
    except NotImplementedError as error:
        return Result(case=case, note=f"not built: {error}")
    with no_garbage_collection():
        quantities = play(case, contest, place.device, rounds)
    return summary(case, quantities)


def play(case: Case, contest: Contest, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """What each call took in each round, on the slowest rank."""
    meter = {"ms": milliseconds, "KiB": kibibytes}[case.unit]
    names = list(contest.calls)
    on_one_clock = share_a_clock(contest.group, device)
    rows = []
    for number in range(-case.warmups, rounds):
        gc.collect()
        row = dict.fromkeys(names, 0.0)
        for name in names if number % 2 == 0 else reversed(names):
            contest.prepare()
            start_together(contest.group, device, on_one_clock)
            row[name], norm = meter(contest.calls[name], device)
            contest.check(norm)
        rows.append(list(row.values()))
    slowest = torch.tensor(rows[case.warmups :], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=contest.group)
    measured = dict(zip(names, slowest.T.tolist(), strict=True))
    return measured | {name: [value] * rounds for name, value in contest.constants.items()}


def start_together(group: dist.ProcessGroup | None, device: torch.device, on_one_clock: bool) -> None:
    """Let all ranks continue at the same time; after a barrier alone they are up to a millisecond apart on a CPU."""
    if not on_one_clock:
        dist.barrier(group)
        return
    moment = torch.tensor([time.perf_counter() + START], dtype=torch.float64, device=device)
    dist.all_reduce(moment, dist.ReduceOp.MAX, group=group)
    start = moment.item()
    while time.perf_counter() < start:
        pass


def share_a_clock(group: dist.ProcessGroup | None, device: torch.device) -> bool:
    """Whether all ranks run on one machine since the same boot, so that their clocks agree."""
    start = BOOT.read_text() if BOOT.exists() else socket.gethostname()
    number = float(int.from_bytes(blake2b(start.encode(), digest_size=6).digest()))
    extremes = torch.tensor([number, -number], dtype=torch.float64, device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    return extremes.sum().item() == 0


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """No automatic collection; an explicit one looks only at objects made since."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        gc.collect()


def milliseconds(call: Call, device: torch.device) -> tuple[float, Tensor | None]:
    """How long a call takes, and what it returns."""
    wait_for(device)
    start = time.perf_counter()
    norm = call()
    wait_for(device)
    return 1000 * (time.perf_counter() - start), norm


def kibibytes(call: Call, device: torch.device) -> tuple[float, Tensor | None]:
    """The peak tensor memory of a call above what was there before, and what it returns."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        norm = call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1024, norm
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        norm = call()
    return peak(allocations(profiled)) / 1024, norm


def allocations(profiled: profile) -> list[int]:
    """Bytes allocated (above 0) and freed (below) by torch's CPU allocator, in order."""
    with TemporaryDirectory(prefix="distclip-bench-") as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    found = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    return [event["args"]["Bytes"] for event in sorted(found, key=lambda event: event["ts"])]


def peak(changes: list[int]) -> int:
    """The highest running sum, from 0 on."""
    held = highest = 0
    for change in changes:
        held += change
        highest = max(highest, held)
    return highest


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
