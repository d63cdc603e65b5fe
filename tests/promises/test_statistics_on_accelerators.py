"""Statistics on accelerators, on one that is not there: the same norms, no wait, few launches."""

from math import inf, isnan, nan
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distclip import Clipper, Statistic
from promises.test_accelerator import on_the_accelerator
from support.accelerator import DEVICE, EXISTS, counted_launches, no_waits, raw
from support.ranks import count_collectives, run_ranks
from support.statistics import Recorder, both, expected

pytestmark = pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")

P = (1.0, 2.0, 3.0, inf)
GROUP = Statistic("group", groups={"all": "*", "one": "0", "wild": "?1"})
FINEST = {
    "group": both(GROUP),
    "parameter": both(GROUP, Statistic("parameter")),
    "row": both(Statistic(), GROUP, Statistic("parameter"), Statistic("row")),
}
KINDS = (
    *(((), torch.float32), ((5,), torch.float32), ((7, 5), torch.float32), ((1, 6), torch.float32)),
    *(((3, 4), torch.float64), ((6, 33), torch.bfloat16), ((6, 3), torch.float16), ((4, 3), torch.complex64)),
    *(((0, 3), torch.float32), ((3, 0), torch.float32), ((2, 20_000), torch.float32), ((4, 3, 2, 2), torch.float32)),
)


def made(kinds=KINDS) -> nn.ParameterList:
    """On the device, with gradients that are the same on all ranks."""
    chance = torch.Generator().manual_seed(0)
    model = nn.ParameterList()
    for shape, dtype in kinds:
        values, gradient = (torch.randn(shape, dtype=dtype, generator=chance) for _ in range(2))
        model.append(nn.Parameter(values.to(DEVICE)))
        model[-1].grad = gradient.to(DEVICE)
    return model


def of_all_levels(size: int) -> list[float]:
    """How far off the norms are, for each level that travels and each p; none of the third calls may wait."""
    worst = []
    with on_the_accelerator():
        model = made()
        model[4].grad = None
        names = [name for name, _ in model.named_parameters()]
        zeros = torch.zeros(3, 4)
        gradients = {n: zeros if p.grad is None else raw(p.grad) for n, p in model.named_parameters()}
        whole = {"gradient": gradients, "parameter": {n: raw(p).detach() for n, p in model.named_parameters()}}
        for asked in FINEST.values():
            for p in P:
                recorder = Recorder(asked)
                clipper = Clipper(model, recorder, norm_type=p, nonfinite="propagate")
                for call in range(3):
                    with no_waits():
                        clipper.measure()
                for statistic, norms in recorder.seen.items():
                    oracle = torch.tensor(expected(statistic, whole[statistic.of], names, p), dtype=torch.float64)
                    apart = (raw(norms).view(-1) - oracle).abs()
                    worst.append(torch.where(apart > 0, apart / oracle, 0).max().item())
    return worst


@pytest.mark.parametrize("size", [1, 2])
def test_norms_of_every_level_without_a_wait(size):
    for worst in run_ranks(of_all_levels, size, size, fresh=True):
        assert len(worst) == len(P) * (3 + 5 + 8)
        assert max(worst) <= 2e-7
