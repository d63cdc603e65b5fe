"""Single bits flipped in gradients, each of which must change the fingerprint on every rank.

    python tests/fuzz/fingerprints.py [10000]

Any bit of any element of any copy, under DDP, HSDP, and FSDP2 over tensor parallel with replicated norm layers, in
fp32 and bf16. Each flip must change the number of its parameter, of no other, and that of all. Counted too are flips
in a replica that the fingerprint itself tells, by halves that do not divide.
"""

import sys
import time
from collections import Counter
from functools import partial
from math import inf
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import distclip  # noqa: E402
from distclip.layouts.piece import local_tensor  # noqa: E402
from fuzz.drift import flip  # noqa: E402
from support import parallel  # noqa: E402
from support.parallel import Job, full_gradients, mean_square, net, rows  # noqa: E402
from support.ranks import run_ranks  # noqa: E402


def data_parallel(dtype: torch.dtype, scale: float) -> Job:
    model = DistributedDataParallel(net(dtype))
    mine = rows(dist.get_rank(), dist.get_world_size())
    return Job([model], mean_square(model, mine, scale), lambda: full_gradients(model))


def flipped(layout, times: int, seed: int, dtype: torch.dtype) -> Counter[str]:
    """What each of so many flips came to; the same draw on all ranks."""
    job, draw, rank, size = layout(dtype, 1.0), Random(seed), dist.get_rank(), dist.get_world_size()
    clipper = distclip.Clipper(job.parts, inf, **job.options)
    plan, holders = clipper.engine.plan, clipper.engine.holders
    job.backward()
    before = clipper.fingerprint()
    gradients = [local_tensor(holders[source].grad) for source in plan.sources]
    here = [i for i, gradient in enumerate(gradients) if gradient.numel()]
    counts: Counter[str] = Counter()
    for _ in range(times):
        guilty, where, element, bit = (draw.randrange(1 << 40) for _ in range(4))
        chosen = here[where % len(here)]
        values = gradients[chosen]
        spot = element % values.numel(), bit % (8 * values.element_size())
        told = torch.tensor([chosen if guilty % size == rank else -1])
        if guilty % size == rank:
            flip(values, *spot)
        now = clipper.fingerprint()
        dist.all_reduce(told, dist.ReduceOp.MAX)
        if guilty % size == rank:
            flip(values, *spot)
        name = plan.pieces[int(told)].name
        odd = [each for each in before.parameters if now.parameters[each] != before.parameters[each]]
        counts["changed" if odd == [name] and now.total != before.total else "MISSED"] += 1
        if plan.replicas[int(told)] > 1:
            counts["in a replica"] += 1
            counts["of these told"] += now.differ == (name,)
    assert clipper.fingerprint() == before
    return counts


def main(times: int) -> int:
    layouts = [(data_parallel, 2), (data_parallel, 4), (parallel.hsdp, 4), (parallel.fsdp2_tp, 4)]
    cases = [(*each, dtype) for each in layouts for dtype in (torch.float32, torch.bfloat16)]
    total: Counter[str] = Counter()
    for layout, size, dtype in cases:
        start = time.monotonic()
        share = -(-times // len(cases))
        found, *others = run_ranks(partial(flipped, layout), size, share, 7, dtype, timeout=3000)
        assert all(other == found for other in others)
        total += found
        print(f"{layout.__name__}, {size} ranks, {dtype}: {dict(found)}, {time.monotonic() - start:.0f} s", flush=True)
    print(f"all: {dict(total)}")
    return int(total["MISSED"] > 0)


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000))
