"""Statistics of what the layouts of test_statistics.py lack: kinds of parameters and gradients, and what is not finite.

Also on both roads of a decision, and on the accelerator that is not there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf, isnan, nan
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import distclip
from distclip import Clipper, Statistic
from promises.test_matrix import gradient_of as gradient_in
from support import parallel
from support.layouts import REPLICATED, SHARDED, backward, build, fsdp2
from support.parallel import full_gradients, mesh_of, whole_values
from support.ranks import count_collectives, run_ranks, same_bits
from support.roads import ROADS
from support.samples import crossed
from support.statistics import Recorder, both, expected

P = (1.0, 2.0, 3.0, inf)
GROUP = Statistic("group", groups={"all": "*", "e": "*e*", "some": ("b*", "*bias", "*_*")})
APART = Statistic("group", groups={"embed": "embed*", "blocks": "blocks*", "head": "head*"})
FINEST = {
    "group": both(GROUP),
    "parameter": both(GROUP, Statistic("parameter")),
    "row": both(Statistic(), GROUP, Statistic("parameter"), Statistic("row")),
}
WAYS = (*((p, "row") for p in P), (2.0, "group"), (inf, "parameter"))  # by units, each p; and each level travels
Whole = Mapping[str, Tensor]


def off(seen: Mapping[Statistic, Tensor], whole: Mapping[str, Whole], names: list[str], p: float) -> float:
    """How far the furthest norm is from its oracle, relative to that. ``whole``: gradients and values by name."""
    worst = 0.0
    for statistic, norms in seen.items():
        oracle = torch.tensor(expected(statistic, whole[statistic.of], names, p), dtype=torch.float64)
        assert norms.numel() == len(oracle), statistic
        apart = (norms.view(-1) - oracle).abs()
        worst = max(worst, torch.where(apart > 0, apart / oracle, 0).max().item())
    return worst


def worst_of(
    model: Any,
    names: list[str],
    whole: Mapping[str, Whole],
    clipper_of: Callable[..., Clipper] = Clipper,
    **options: Any,
) -> float:
    """The same over ``WAYS``."""
    worst = 0.0
    for p, finest in WAYS:
        recorder = Recorder(FINEST[finest])
        clipper_of(model, recorder, norm_type=p, **options).measure()
        worst = max(worst, off(recorder.seen, whole, names, p))
    return worst


# ---- kinds of parameters and gradients -----------------------------------------------------------------------


def kinds() -> nn.ParameterDict:
    def made(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, dtype=dtype))

    torch.manual_seed(0)
    model = nn.ParameterDict(
        {
            "scalar": made(),
            "bias": made(5),
            "weight": made(7, 5),
            "one_row": made(1, 6),
            "one_column": made(6, 1),
            "conv": nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)),
            "transposed": nn.Parameter(torch.randn(5, 7).t()),
            "complex": made(4, 3, dtype=torch.complex64),
            "float64": made(3, 4, dtype=torch.float64),
            "bf16": made(6, 33, dtype=torch.bfloat16),
            "fp16": made(6, 3, dtype=torch.float16),
            "no_rows": made(0, 3),
            "no_columns": made(3, 0),
            "embed": made(11, 4),
            "embed_twice": made(11, 4),
            "both_sparse": made(6, 5),
            "no_entries": made(6, 5),
            "long_rows": made(2, 70_000),
            "unused": made(3, 2),
            "frozen": made(2, 2).requires_grad_(False),
        }
    )
    model["tied"] = model["weight"]
    return model


SPARSE = {  # indices
    "embed": torch.tensor([[1, 4, 9]]),
    "embed_twice": torch.tensor([[4, 1, 4, 10, 1, 4]]),
    "both_sparse": torch.tensor([[5, 0, 5, 2, 5], [1, 4, 0, 3, 1]]),
    "no_entries": torch.zeros(1, 0, dtype=torch.int64),
}


def gradient_of(name: str, parameter: Tensor) -> Tensor | None:
    """The same on every rank."""
    chance = torch.Generator().manual_seed(sum(map(ord, name)))
    if name in ("unused", "frozen"):
        return None
    if name in SPARSE:
        at = SPARSE[name]
        values = torch.randn(at.shape[1], *parameter.shape[len(at) :], generator=chance)
        return torch.sparse_coo_tensor(at, values, parameter.shape, check_invariants=True)
    gradient = torch.empty_like(parameter)  # as it lies in memory
    return gradient.copy_(30 * torch.randn(parameter.shape, generator=chance, dtype=parameter.dtype))


def of_kinds(road: str, how: str) -> list[Any]:
    """Units, and how far off all norms are."""
    model, options = kinds(), {}
    gradients = {name: gradient_of(name, p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        setattr(p, "main_grad" if how == "elsewhere" else "grad", gradients[name])
    if how == "elsewhere":
        options["gradients"] = "main_grad"
    if how == "only":
        options["only"] = lambda name, p: name not in ("weight", "embed_twice")
    parameters = {name: p for name, p in model.named_parameters() if options.get("only", lambda *_: True)(name, p)}
    names = names_of(model, **options)
    found = {
        n: torch.zeros(p.shape) if gradients[n] is None else gradients[n].to_dense() for n, p in parameters.items()
    }
    whole = {"gradient": found, "parameter": {n: p.detach() for n, p in parameters.items()}}
    return [names == list(parameters), worst_of(model, names, whole, ROADS[road], **options)]


@pytest.mark.parametrize("how", ["in place", "elsewhere", "only"])
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("size", [1, 2])
def test_kinds_of_parameters_and_gradients(size, road, how):
    for named, worst in run_ranks(of_kinds, size, road, how):
        assert named
        assert worst <= 2e-7


# ---- more layouts -------------------------------------------------------------------------------------------


def wholes(model: nn.Module) -> dict[str, Whole]:
    """Gradients and values by name, zeros where there is no gradient; what is in ``.grad`` is lost."""
    job = parallel.Job([model], lambda: None, lambda: unwrapped(full_gradients(model)))
    found, values = job.whole(), whole_values(job)
    return {"gradient": {n: found.get(n, torch.zeros_like(v)) for n, v in values.items()}, "parameter": values}


def unwrapped(found: Whole) -> dict[str, Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def names_of(model: Any, **options: Any) -> list[str]:
    return list(Clipper(model, inf, watch="parameters", **options).measure().norms)


def on_layout(layout: Callable[[], nn.Module]) -> float:
    model = layout()
    backward(model)
    whole = wholes(model)
    for p in model.parameters():
        p.grad = None
    backward(model)
    return worst_of(model, names_of(model), whole)


@pytest.mark.parametrize("layout", [*REPLICATED, *SHARDED], ids=lambda layout: layout.__name__)
def test_ddp_and_fsdp2_of_all_kinds(layout):
    first, second = run_ranks(on_layout, 2, layout)
    assert first == second
    assert first <= 2e-7


def uneven_rows() -> float:
    """Seven rows cut by tensor parallel into 4 and 3, and these by FSDP2, beside those of one process."""

    def made() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))

    mesh, alone, model = mesh_of(("dp", 2), ("tp", 2)), made(), made()
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(output_layouts=Replicate())})
    fully_shard(model, mesh=mesh["dp"])
    for each in (alone, model):
        each(torch.arange(10.0).view(2, 5)).square().sum().backward()
    gradients = {n: p.grad for n, p in alone.named_parameters()}
    values = {n: p.detach() for n, p in alone.named_parameters()}
    return worst_of(model, list(values), {"gradient": gradients, "parameter": values})


def test_fsdp2_over_uneven_tensor_parallel():
    found = run_ranks(uneven_rows, 4)
    assert found == [found[0]] * 4
    assert found[0] <= 1e-6


def permuted(ranks: list[Any]) -> list[Any]:
    """How far off norms of groups and parameters are, and of rows, or why these are not known."""
    axes = ("replicate", "shard")[-torch.tensor(ranks).ndim :]
    model = fully_shard(build(), mesh=DeviceMesh("cpu", ranks, mesh_dim_names=axes))
    backward(model)
    seen: list[Any] = []
    for asked in (FINEST["parameter"], (Statistic("row"),)):
        recorder = Recorder(asked)
        try:
            Clipper(model, recorder).measure()
            seen.append(recorder.seen)
        except distclip.LayoutError as error:
            seen.append(str(error))
    names, whole = names_of(model), wholes(model)
    return [each if isinstance(each, str) else off(each, whole, names, 2.0) for each in seen]


@pytest.mark.parametrize("ranks", [[[0, 2], [1, 3]], [2, 0, 3, 1], [[3, 1], [2, 0]]], ids=str)
def test_permuted_meshes_have_norms_of_parameters_and_rows_where_these_are_known(ranks):
    found = run_ranks(permuted, 4, ranks)
    assert found == [found[0]] * 4
    parameters, by_row = found[0]
    assert parameters <= 2e-7
    if ranks == [[0, 2], [1, 3]]:
        assert by_row <= 2e-7
    else:
        assert "rows" in by_row


def without_some() -> float:
    """FSDP2, where the last rank lacks a gradient: as if its part were zeros."""
    model = fsdp2()
    backward(model)
    last, chosen = dist.get_rank() == dist.get_world_size() - 1, model.embed.weight
    if last:
        chosen.grad.to_local().zero_()
    kept = {p: p.grad for p in model.parameters()}
    whole = wholes(model)
    for p, gradient in kept.items():
        p.grad = None if last and p is chosen else gradient
    return worst_of(model, names_of(model), whole)


def test_what_a_rank_lacks_is_zeros():
    first, *others = run_ranks(without_some, 3)
    assert [first] * 2 == others
    assert first <= 2e-7


def first_and_later() -> float:
    """Pending sums are realigned after the first call has met them, and before the later ones."""
    job, worst = parallel.by_hand_realigned(torch.float32, 30.0), 0.0
    job.backward()
    whole = {"gradient": job.whole(), "parameter": whole_values(job)}
    names = names_of(job.parts)
    for p, finest in WAYS:
        recorder = Recorder(FINEST[finest])
        clipper = Clipper(job.parts, recorder, norm_type=p)
        for _ in range(3):
            job.backward()
            clipper.measure()
            worst = max(worst, off(recorder.seen, whole, names, p))
    return worst


def test_pending_sums_are_realigned_in_the_first_call_and_in_later_ones():
    found = run_ranks(first_and_later, 4)
    assert found == [found[0]] * 4
    assert found[0] <= 2e-7


def two_models() -> list[float]:
    """Two Clippers whose calls take turns."""
    models = [fsdp2(), nn.ParameterDict({"b": nn.Parameter(torch.randn(4, 3))})]
    backward(models[0])
    models[1]["b"].grad = torch.full((4, 3), 2.0)
    recorders = [Recorder((Statistic(finest),)) for finest in ("row", "parameter")]
    clippers = [Clipper(model, recorder) for model, recorder in zip(models, recorders, strict=True)]
    for turn in (0, 1, 0, 1, 1, 0):
        clippers[turn].clip_()
    names = [names_of(models[0]), ["b"]]
    return [off(r.seen, wholes(m), n, 2.0) for r, m, n in zip(recorders, models, names, strict=True)]


def test_two_clippers_of_one_group_take_turns():
    first, second = run_ranks(two_models, 2)
    assert first == second
    assert max(first) <= 2e-7


@dataclass
class Halved(Recorder):
    """Halves every unit."""

    def decide(self, statistics, state):
        per, units = self.asked[0], statistics.norm(self.asked[0])
        return distclip.Decision(inf, coef=torch.full_like(units, 0.5), per=per), super().decide(statistics, state)[1]


def without(shapes: tuple[tuple[int, ...], ...], road: str) -> list[Any]:
    """What policies see, and the coefficient of one that halves every unit."""
    found = []
    for finest in ("parameter", "row"):
        for p in P:
            model = nn.ParameterList(nn.Parameter(torch.ones(shape)) for shape in shapes)
            for parameter in model:
                parameter.grad = torch.ones_like(parameter)
            recorder, halved = Recorder(both(Statistic(finest))), Halved((Statistic(finest),))
            norm = ROADS[road](model, recorder, norm_type=p).measure().norm.item()
            coef = ROADS[road](model, halved, norm_type=p).measure().coef.item()
            found.append([norm, [norms.tolist() for norms in recorder.seen.values()], coef])
    return found


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("size", [1, 2])
def test_a_model_without_parameters_has_no_units_and_one_without_elements_no_norms(size, road):
    assert run_ranks(without, size, (), road) == [[[0.0, [0.0, [], []], 1.0]] * 8] * size
    empty = [[0.0, [0.0, [0.0] * 3, [0.0] * 3], 1.0]] * 4 + [[0.0, [0.0, [0.0] * 2, [0.0] * 2], 1.0]] * 4
    assert run_ranks(without, size, ((0, 3), (2, 0), (0, 4)), road) == [empty] * size
    nothing = [[0.0, [0.0, [0.0], [0.0]], 1.0]] * 4 + [[0.0, [0.0, [], []], 1.0]] * 4
    assert run_ranks(without, size, ((0, 3),), road) == [nothing] * size


# ---- what is not finite -------------------------------------------------------------------------------------

BAD = ((1.0, nan), (2.0, inf), (2.0, nan), (inf, nan), (inf, inf))


@dataclass(frozen=True)
class Hit:
    """What one bad number did: how many units it made bad, whether the others kept their bits, the all-reduces of the
    call, and who was blamed, and had to be.
    """

    bad: int
    kept: bool
    reduced: int
    culprit: tuple[str, str]
    expected: tuple[str, str]


def hit(job: parallel.Job, road: str, asked: Statistic, p: float, bad: float) -> Hit:
    """On the last rank, in the third call, in which no copies are compared."""
    recorder = Recorder((asked,))
    for parameter in job.parameters():
        parameter.grad = None
    job.backward()
    clipper = ROADS[road](job.parts, recorder, norm_type=p, on_drift="ignore", **job.options)
    clipper.clip_()
    clipper.clip_()
    before, name = recorder.seen[asked], spoiled(clipper, bad)
    with count_collectives() as counts:
        clipper.clip_()
        if road == "device":  # one call late
            assert clipper.culprit is None
            clipper.measure()
    after = recorder.seen[asked]
    finite = after.isfinite()
    kind, parameter = clipper.culprit.kind, clipper.culprit.parameter.partition("[")[0]
    kept = same_bits([before[finite], after[finite]])
    expected = "NaN" if isnan(bad) else "inf", name
    return Hit(int((~finite).sum()), kept, counts.total(), (kind, parameter), expected)


def spoiled(clipper: Clipper, bad: float) -> str:
    """The last of the last rank's gradients gets a bad number; its name."""
    mine = [i for i in range(len(clipper.engine.plan.pieces)) if gradient_in(clipper, i).numel()]
    if dist.get_rank() == dist.get_world_size() - 1:
        gradient_in(clipper, mine[-1]).view(-1)[0] = bad
    return clipper.engine.plan.label(mine[-1])


def all_hits(layout: Callable[..., parallel.Job], road: str) -> list[Hit]:
    job = layout(torch.float32, 30.0)
    by_parameter, by_row = Statistic("parameter"), Statistic("row")
    return [hit(job, road, by_parameter, *bad) for bad in BAD[::2]] + [hit(job, road, by_row, *bad) for bad in BAD[1:]]


LAYOUTS = [parallel.hsdp, parallel.fsdp2_tp, parallel.pp_fsdp2, parallel.ep_named, parallel.fsdp1_full_flat]


@pytest.mark.parametrize(("layout", "road"), crossed(LAYOUTS, ROADS))
def test_one_bad_number_stays_in_its_unit_which_is_blamed_without_another_collective(layout, road):
    results = run_ranks(all_hits, 4, layout, road)
    for hits in zip(*results, strict=True):
        right = hits[-1].expected
        reduced = 1 if road == "host" else 2  # by the call, and by the one that is late
        assert [replace(each, expected=right) for each in hits] == [Hit(1, True, reduced, right, right)] * 4


def grouped(road: str) -> list[Any]:
    job = parallel.hsdp(torch.float32, 30.0)
    hits = [hit(job, road, APART, p, bad) for p, bad in BAD]
    return [(each.bad, each.kept, each.reduced, each.culprit == each.expected) for each in hits]


@pytest.mark.parametrize("road", ROADS)
def test_groups_do_not_tell_the_culprit_and_ranks_are_asked(road):
    for hits in run_ranks(grouped, 4, road)[-1:]:
        assert hits == [(1, True, 4 if road == "host" else 5, True)] * len(BAD)
