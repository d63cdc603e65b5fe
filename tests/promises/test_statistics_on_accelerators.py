"""Statistics on accelerators, on one that is not there: the same norms, no wait, few launches."""

from math import inf, nan

import pytest
import torch
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


def of_all_levels() -> list[float]:
    """How far off the norms are, for each level that travels and each p."""
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
                for _ in range(2):
                    with no_waits():
                        clipper.measure()
                for statistic, norms in recorder.seen.items():
                    oracle = torch.tensor(expected(statistic, whole[statistic.of], names, p), dtype=torch.float64)
                    apart = (raw(norms).view(-1) - oracle).abs()
                    worst.append(torch.where(apart > 0, apart / oracle, 0).max().item())
    return worst


@pytest.mark.parametrize("size", [1, 2])
def test_norms_of_every_level_without_a_wait(size):
    for worst in run_ranks(of_all_levels, size, fresh=True):
        assert len(worst) == len(P) * (3 + 5 + 8)
        assert max(worst) <= 2e-7


def launches_of() -> dict[str, list[list[int]]]:
    """Kernels on one tensor each in a call, without and with norms of a level: of few, of many and of tall tensors."""
    found: dict[str, list[list[int]]] = {"parameter": [], "row": []}
    with on_the_accelerator():
        for level, seen in found.items():
            for count, shape in ((10, (4, 3)), (100, (4, 3)), (10, (400, 3))):
                model = made([(shape, torch.float32)] * count)
                clippers = [Clipper(model, Recorder(asked)) for asked in ((), (Statistic(level),))]
                for clipper in clippers:
                    clipper.measure()
                seen.append([launched_by(clipper) for clipper in clippers])
    return found


def launched_by(clipper: Clipper) -> int:
    with counted_launches() as launches:
        clipper.measure()
    return len(launches)


@pytest.mark.parametrize("size", [1, 2])
def test_launches_do_not_grow_with_parameters_or_rows(size):
    for level, (few, many, tall) in run_ranks(launches_of, size, fresh=True)[0].items():
        assert few == many == tall
        assert few[1] - few[0] <= {"parameter": 4, "row": 7}[level]


BAD = {nan: "NaN", inf: "inf"}


def blamed() -> list[tuple[object, ...]]:
    """By level and bad number, which comes in the third call, in which no copies are compared: the units that are not
    finite, the culprit before the next call and after it, and the all-reduces of both.
    """
    found = []
    with on_the_accelerator():
        for statistic in (Statistic("parameter"), Statistic("row")):
            for bad in BAD:
                model, recorder = made([((4, 3), torch.float32)] * 3), Recorder((statistic,))
                clipper = Clipper(model, recorder)
                clipper.clip_()
                clipper.clip_()
                raw(model[1].grad)[2, 1] = bad
                with count_collectives() as counts, no_waits():
                    clipper.clip_()
                early = clipper.culprit
                with count_collectives() as late:
                    clipper.measure()
                units = (~raw(recorder.seen[statistic]).isfinite()).nonzero().flatten().tolist()
                culprit = clipper.culprit
                found.append((units, early, culprit.kind, culprit.parameter, counts.total(), late.total()))
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_one_bad_number_is_blamed_one_call_later_without_another_collective(size):
    for found in run_ranks(blamed, size, fresh=True):
        assert found == [(units, None, kind, "1", 1, 1) for units in ([1], [6]) for kind in BAD.values()]
