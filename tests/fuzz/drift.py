"""Single bits flipped in copies of gradients, each of which must be caught, and honest steps, none of which may be.

    python tests/fuzz/drift.py flips [10000]     # 10,000 flips
    python tests/fuzz/drift.py honest [100000]   # 100,000 steps

Flips: any bit of any element of any copy under DDP, HSDP, and FSDP2 over tensor parallel with replicated norm layers.
Every rank must raise LayoutError in that step, or skip it where the flip made a NaN or inf. Honest: every layout of the
matrix, three seeds, 2 and 4 ranks, and several Clippers that see the same gradients; a warning or an error is an alarm.
"""

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from pathlib import Path
from random import Random
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import distclip  # noqa: E402
from distclip.layouts.piece import local_tensor  # noqa: E402
from distclip.plan.families import NO_FAMILY  # noqa: E402
from support import parallel  # noqa: E402
from support.layouts import ddp  # noqa: E402
from support.parallel import FOUR, TWO, Job, full_gradients, mean_square, rows  # noqa: E402
from support.ranks import run_ranks  # noqa: E402

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SEEDS = (0, 1, 2)
KINDS: Sequence[dict[str, Any]] = ({}, {"norm_type": 1.0}, {"norm_type": inf}, {"exact": True}, {"watch": "parameters"})


def data_parallel(dtype: torch.dtype, scale: float) -> Job:
    model = ddp()
    return Job(
        [model], mean_square(model, rows(dist.get_rank(), dist.get_world_size()), scale), lambda: full_gradients(model)
    )


class Stage(nn.Module):
    """One of two stages, whose parameters have names of the other's."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def stages_of_ddp(dtype: torch.dtype, scale: float) -> Job:
    """Pipeline stages under DDP: which ranks hold copies is in no metadata."""
    mesh = parallel.mesh_of(("pp", 2), ("dp", dist.get_world_size() // 2))
    model = DistributedDataParallel(Stage(mesh.get_local_rank("pp")).to(dtype), process_group=mesh.get_group("dp"))
    words = torch.randn(4, 6, generator=torch.Generator().manual_seed(dist.get_rank())).to(dtype)

    def backward() -> None:
        (scale * model(words).square().mean()).backward()

    return Job([model], backward, lambda: full_gradients(model), {"split_over": [mesh["pp"]]})


LAYOUTS: dict[str, Callable[..., Job]] = {each.__name__: each for each in (*TWO, *FOUR, data_parallel, stages_of_ddp)}


def flip(values: Tensor, element: int, bit: int) -> None:
    """Flip one bit of one element of ``values``, of any strides."""
    integers = values.view(INTEGERS[values.element_size()])
    at = [int(k) for k in torch.unravel_index(torch.tensor(element), integers.shape)]
    highest = bit == 8 * values.element_size() - 1
    integers[tuple(at)] ^= -(1 << bit) if highest else 1 << bit


def put_back(holders: Sequence[Tensor], kept: Sequence[Tensor | None]) -> None:
    for holder, gradient in zip(holders, kept, strict=True):
        if gradient is not None:
            local_tensor(holder.grad).copy_(gradient)


def flipped(layout: Callable[..., Job], times: int, seed: int, dtype: torch.dtype = torch.float32) -> list[str]:
    """What each of so many flips, in calls that compare nothing else, came to on this rank; the same draw on all."""
    job, draw = layout(dtype, 1.0), Random(seed)
    clipper = distclip.Clipper(job.parts, inf, on_drift="raise", **job.options)
    plan, holders = clipper.engine.plan, clipper.engine.holders
    job.backward()
    kept = [None if h.grad is None else local_tensor(h.grad).clone() for h in holders]
    clipper.clip_()
    assert plan.copies is not None
    assert not plan.copies.loose
    clipper.engine.progress.calls.compare_in = inf
    compared = [i for i, family in enumerate(plan.copies.families) if family != NO_FAMILY and plan.pieces[i].here]
    compared = [i for i in compared if kept[plan.sources[i]] is not None]
    ended: list[str] = []
    while len(ended) < times:
        guilty, where, element, bit = (draw.randrange(1 << 40) for _ in range(4))
        if guilty % dist.get_world_size() == dist.get_rank():
            i = compared[where % len(compared)]
            values = local_tensor(holders[plan.sources[i]].grad)
            values = values if plan.pieces[i].span is None else values[plan.pieces[i].span]
            flip(values, element % values.numel(), bit % (8 * values.element_size()))
        try:
            ended.append("skipped" if clipper.clip_().skip else "missed")
        except distclip.LayoutError as error:
            ended.append("named" if "have drifted apart in step" in str(error) else str(error))
        put_back(holders, kept)
    clipper.clip_()  # and without a flip nothing is wrong
    return ended


@torch.no_grad()
def step_(holders: Sequence[Tensor]) -> None:
    """A step of gradient descent, as all ranks make it."""
    for holder in holders:
        if holder.grad is not None:
            local_tensor(holder).sub_(local_tensor(holder.grad), alpha=0.01)
            local_tensor(holder.grad).zero_()


def honest(layout: Callable[..., Job], steps: int, seed: int) -> tuple[int, list[str]]:
    """How many honest calls were made, and what was wrong with them."""
    job = layout(torch.float32, 1.0)
    clippers = []
    for kind in KINDS:
        try:
            clippers.append(distclip.Clipper(job.parts, inf, on_drift="raise", **kind, **job.options))
        except ValueError:  # no norm of each parameter where the layout does not say which ranks hold it
            continue
    chance = torch.Generator().manual_seed(seed)
    holders = clippers[0].engine.holders
    alarms: list[str] = []
    with warnings.catch_warnings(record=True, action="always") as warned:
        for _ in range(steps):
            job.backward()
            times = float(torch.rand(1, generator=chance)) + 0.5
            for gradient in (local_tensor(h.grad) for h in holders if h.grad is not None):
                gradient.mul_(times)
            for clipper in clippers:
                try:
                    clipper.clip_()
                except distclip.LayoutError as error:
                    alarms.append(str(error))
            step_(holders)
    alarms += [str(each.message) for each in warned if "drifted" in str(each.message)]
    return steps * len(clippers), alarms


def play_flips(times: int) -> int:
    layouts = [(data_parallel, 2), (data_parallel, 4), (parallel.hsdp, 4), (parallel.fsdp2_tp, 4), (stages_of_ddp, 4)]
    wrong = 0
    for layout, size in layouts:
        start, results = (
            time.monotonic(),
            run_ranks(partial(flipped, layout), size, times // len(layouts), 7, timeout=3000),
        )
        alike = [set(ends) for ends in zip(*results, strict=True)]
        wrong += sum(ends not in ({"named"}, {"skipped"}) for ends in alike)
        counts = {what: sum(what in ends for ends in alike) for ends in alike for what in ends}
        print(f"{layout.__name__}, {size} ranks: {counts}, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{wrong} flips that were not caught on every rank in their step")
    return wrong


def play_honest(steps: int) -> int:
    layouts = [
        (data_parallel, 2),
        (data_parallel, 4),
        (stages_of_ddp, 4),
        *((each, 2) for each in TWO),
        *((each, 4) for each in FOUR),
    ]
    each, made, alarms = -(-steps // (len(layouts) * len(SEEDS) * len(KINDS))), 0, 0
    start = time.monotonic()
    for layout, size in layouts:
        for seed in SEEDS:
            results = run_ranks(partial(honest, layout), size, each, seed, timeout=3000)
            made += results[0][0]
            found = {text for _, texts in results for text in texts}
            alarms += len(found)
            if found:
                print(f"{layout.__name__}, {size} ranks, seed {seed}: {found}", flush=True)
        print(f"{layout.__name__}, {size} ranks: {made} calls by now, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{made} honest calls, {alarms} alarms")
    return alarms


if __name__ == "__main__":
    play, usual = {"flips": (play_flips, 10_000), "honest": (play_honest, 100_000)}[sys.argv[1]]
    raise SystemExit(play(int(sys.argv[2]) if len(sys.argv) > 2 else usual) > 0)
