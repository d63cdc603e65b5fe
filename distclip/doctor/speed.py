"""What clipping adds to a training step of a model of the user's size, under FSDP2 on these ranks."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch.optim import AdamW

from distclip import Clipper
from distclip.bench.result import quartiles
from distclip.bench.subject import Subject, gpt
from distclip.doctor.finding import Finding
from distclip.doctor.meeting import Record
from distclip.doctor.place import Site

SECONDS = 1.5  # to measure for
FEWEST, MOST = 3, 40  # rounds
WIDEST = 4096


def run(parameters: int, site: Site) -> Record:
    """Steps with and without clipping, in turns: how many times as long they take, on this rank."""
    layers, width = sizes(parameters)
    subject = gpt(site.place, layers=layers, width=width, time=16, batch=2)
    optimizer = AdamW(subject.parameters, lr=0.0, fused=True)
    clipper = Clipper(subject.model, 1e-3)  # in force in every step
    calls: list[Callable[[], object]] = [optimizer.step, partial(clipper.step, optimizer)]
    for _ in range(2):  # the first is a warm-up
        once = sum(timed(site, subject, call) for call in calls)
    times = [[timed(site, subject, call) for call in calls] for _ in range(agreed(site, SECONDS / once))]
    plain, clipped = zip(*times, strict=True)
    ratios = [c / p for p, c in times]
    return {
        "parameters": sum(p.numel() for p in subject.parameters),
        "tensors": len(subject.parameters),
        "plain": median(plain),
        "clipped": median(clipped),
        "ratio": median(ratios),
        "quartiles": quartiles(ratios),
        "rounds": len(times),
    }


def sizes(parameters: int) -> tuple[int, int]:
    """Layers and width of a GPT of about so many parameters: 12 times the square of the width in a layer."""
    width = min(WIDEST, max(16, 16 * round((parameters / 48) ** 0.5 / 16)))
    return max(1, round(parameters / (12 * width**2))), width


def timed(site: Site, subject: Subject, step: Callable[[], object]) -> float:
    """Seconds of a training step, from forward to optimizer."""
    dist.barrier()
    start = time.perf_counter()
    subject.backward()
    step()
    if site.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def agreed(site: Site, rounds: float) -> int:
    """The fewest rounds that any rank has time for."""
    fewest = torch.tensor(min(MOST, max(FEWEST, int(rounds))), device=site.device)
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    return int(fewest.item())


def judge(name: str, records: Sequence[Record]) -> Finding:
    slowest = max(records, key=lambda record: float(record["clipped"]))
    low, high = slowest["quartiles"]
    text = (
        f"a step of {slowest['parameters'] / 1e6:.3g} M parameters in {slowest['tensors']} tensors takes "
        f"{1000 * slowest['clipped']:.3g} ms with clipping, {1000 * slowest['plain']:.3g} ms without: "
        f"{slowest['ratio']:.3g}x in the median of {slowest['rounds']} rounds (quartiles {low:.3g} to {high:.3g})"
    )
    return Finding(name=name, text=text, facts=slowest)
