"""exact=True: the float64 number nearest to the norm, whatever the layout, the ranks and the order."""

import random
from decimal import Decimal, localcontext
from fractions import Fraction
from math import inf, nan

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip import Clipper, LayoutError, NonFiniteError
from promises.test_accelerator import on_the_accelerator
from promises.test_statistics_on_accelerators import KINDS, made
from support.accelerator import EXISTS, raw
from support.parallel import EIGHT, FOUR, THREE, TWO, united
from support.ranks import count_collectives, run_ranks, same_bits
from support.samples import most, sample

P = (1.0, 2.0, inf)
LAYOUTS = most(
    [
        pytest.param(layout, size, id=f"{layout.__name__}-{size}")
        for size, layouts in ((2, TWO), (3, THREE), (4, FOUR), (8, EIGHT))
        for layout in layouts
    ],
    *("fsdp1_grad_op-2", "fsdp1_grad_op_flat-2", "fsdp1_no_shard-2", "fsdp1_ignored-2", "fsdp1_full-3", "fsdp1_full-4"),
    *("fsdp1_full_flat-4", "fsdp1_hybrid-4", "fsdp1_hybrid_zero2-4", "fsdp1_experts-4", "fsdp1_copies-4"),
    *("fsdp1_tp_flat-4", "cp_fsdp2-4", "hsdp_tp-8", "hsdp_tp_sequence-8", "pp_fsdp2_tp-8", "by_hand-8"),
)


def nearest_norm(tensors: list[Tensor], p: float) -> float:
    """By fractions and decimals: the float64 number nearest to the norm."""
    numbers = [abs(x) for t in tensors for x in (torch.view_as_real(t) if t.is_complex() else t).flatten().tolist()]
    if any(x != x for x in numbers):
        return nan
    if inf in numbers or p == inf:
        return max(numbers, default=0.0)
    total = sum(Fraction(x) ** int(p) for x in numbers)
    with localcontext(prec=400):
        exact = Decimal(total.numerator) / Decimal(total.denominator)
        return float(exact if p == 1 else exact.sqrt())


def shown(norm: float, dtype: torch.dtype = torch.float32) -> Tensor:
    most = torch.finfo(dtype).max
    return torch.tensor(most if most < norm < inf else norm, dtype=dtype)


def measured(layout, dtype: torch.dtype) -> dict[str, object]:
    job = layout(dtype, 30.0)
    job.backward()
    whole = united(job)
    clipper = Clipper(job.parts, 1.0, exact=True, **job.options)
    by_clipper = clipper.measure().norm
    norms = {p: distclip.clip_grad_norm_(job.parts, inf, p, exact=True, **job.options) for p in P}
    with count_collectives() as counts:
        clipper.measure()
    clipper.verify()
    found = {"norms": norms, "clipper": by_clipper, "coef": clipper.clip_().coef, "counts": dict(counts)}
    oracle = {p: nearest_norm(whole, p) for p in P}
    return found | {"oracle": oracle, "known": job.exact, "realigns": job.realigns}


@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
def test_every_layout_has_the_norm_that_is_nearest(layout, size):
    check(run_ranks(measured, size, layout, torch.float32))


@pytest.mark.parametrize(("layout", "size"), sample(LAYOUTS, "fsdp1_mixed_precision-2", "tp_sequence-2", "by_hand-4"))
def test_also_of_bf16(layout, size):
    check(run_ranks(measured, size, layout, torch.bfloat16))


def check(ranks: list[dict[str, object]]) -> None:
    first = ranks[0]
    assert same_bits([(rank["norms"], rank["clipper"], rank["coef"]) for rank in ranks])
    for p, norm in first["norms"].items():
        oracle = first["oracle"][p]
        assert oracle > 0
        assert norm.item() == pytest.approx(oracle, rel=2e-2)
        assert not first["known"] or torch.equal(norm, shown(oracle, norm.dtype))
    assert torch.equal(first["norms"][2.0], first["clipper"])
    assert first["realigns"] or first["counts"] == {"allreduce": 1}


def filled(values: list[float], dtype: torch.dtype, cut: int = 1) -> nn.Module:
    """A module whose gradients are these, in ``cut`` parameters."""
    module = nn.Module()
    for k in range(cut):
        mine = torch.tensor(values[k::cut], dtype=dtype)
        parameter = nn.Parameter(torch.zeros_like(mine))
        parameter.grad = mine
        module.register_parameter(f"p{k}", parameter)
    return module


RANGES = {
    "ordinary": lambda chance: chance.gauss(0, 1),
    "far apart": lambda chance: chance.gauss(0, 1) * 10.0 ** chance.randint(-40, 37),
    "subnormal": lambda chance: 2.0 ** -chance.randint(127, 149),
    "huge": lambda chance: chance.uniform(1e38, 3e38),
    "half": lambda chance: chance.choice([6e-8, 65504.0, 1.0, -0.0, -3.1e-5]),
    "zero": lambda chance: chance.choice([0.0, -0.0]),
}


@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str
)
def test_any_numbers_in_any_order(kind, p, dtype):
    chance = random.Random(7)
    values = [RANGES[kind](chance) for _ in range(1003)]
    values = torch.tensor(values, dtype=torch.float64).to(dtype)
    values = values[values.abs() < inf].tolist()
    real = torch.float64 if dtype == torch.float64 else torch.float32
    if dtype.is_complex and p != 2:
        with pytest.raises(ValueError, match="modulus"):
            Clipper(filled(values, dtype), 1.0, norm_type=p, exact=True)
        return
    norms = []
    for order in range(3):
        model = filled(values, dtype, cut=1 + 2 * order)
        gradients = [parameter.grad for parameter in model.parameters()]
        norms.append(Clipper(model, 1.0, norm_type=p, exact=True).measure().norm)
        norms.append(distclip.get_total_norm(gradients, p, exact=True))
        chance.shuffle(values)
    expected = nearest_norm([torch.tensor(values, dtype=dtype)], p)
    assert all(torch.equal(norm, shown(expected, real)) for norm in norms)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_is_not_finite_skips_and_is_named(bad, dtype):
    model = filled([1.0, bad, 2.0], dtype)
    clipper = Clipper(model, 1.0, exact=True)
    report = clipper.clip_()
    assert report.skip
    assert str(report.norm.item()) == str(abs(bad))
    assert report.culprit.parameter == "p0"
    with pytest.raises(NonFiniteError, match="p0"):
        distclip.clip_grad_norm_(model, 1.0, error_if_nonfinite=True, exact=True)


def test_what_cannot_be_exact_is_refused():
    model = filled([1.0], torch.float32)
    with pytest.raises(ValueError, match=r"exact=True: .* order 1, 2 and inf"):
        Clipper(model, 1.0, norm_type=3, exact=True)
    with pytest.raises(ValueError, match=r"exact=True: .* order 1, 2 and inf"):
        distclip.clip_grad_norm_(model, 1.0, 3.0, exact=True)
    with pytest.raises(ValueError, match="exact=True measures the norm of all gradients alone"):
        Clipper(model, 1.0, watch="parameters", exact=True)
    with pytest.raises(ValueError, match="exact=True measures the norm of all gradients alone"):
        Clipper(model, distclip.SkipSpikes(on=("loss",)), exact=True)


def some_ask() -> list[str]:
    met = []
    model = filled([1.0, 2.0], torch.float32)
    try:
        Clipper(model, 1.0, exact=dist.get_rank() == 1)
    except ValueError as error:
        met.append(str(error))
    clipper = Clipper(model, 1.0, exact=True)
    try:
        if dist.get_rank() == 0:
            clipper.measure()
        else:
            clipper.clip_()
    except LayoutError as error:
        met.append(str(error))
    return met


def test_ranks_that_differ_are_named():
    for settings, calls in run_ranks(some_ask, 2):
        assert "exact" in settings
        assert "measure()" in calls or "step 0" in calls


def trained(steps: int) -> Tensor:
    """Weights after steps on the same gradients, cut over the ranks there are.

    By hand: an optimizer's vectors and what is left behind them are rounded differently.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    chance = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=chance) for shape in ((7, 5), (11,), (4, 3))]
    model = nn.Module()
    for k, each in enumerate(whole):
        model.register_parameter(f"p{k}", nn.Parameter(distribute_tensor(each.double(), mesh, [Shard(0)])))
    clipper = Clipper(model, distclip.AutoClip(percentile=40, window=9), exact=True)
    for step in range(steps):
        for parameter, each in zip(model.parameters(), whole, strict=True):
            gradient = torch.randn(each.shape, generator=chance) * (1 + step % 7)
            parameter.grad = distribute_tensor(gradient.double(), mesh, [Shard(0)])
        clipper.clip_()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad * 0.01)
    assert 5 < clipper.history.clipped < steps
    return torch.cat([p.full_tensor().flatten() if isinstance(p, DTensor) else p for p in model.parameters()]).detach()


def test_training_has_the_same_bits_on_any_number_of_ranks():
    alone, *others = [run_ranks(trained, size, 50)[0] for size in (1, 2, 3, 4)]
    assert all(torch.equal(alone, other) for other in others)


def altered() -> list[str]:
    from distclip.ranks import connections, digits

    model, met = filled([1.0, 2.0], torch.float32), []
    clipper = Clipper(model, 1.0, exact=True)
    for word in (5, 80, 137):

        def reduce(group, message, *more, word=word):
            reduced = connections.all_reduce(group, message, *more)
            reduced[word] += 1 << 20
            return reduced

        digits.all_reduce = reduce
        try:
            clipper.measure()
        except RuntimeError as error:
            met.append(str(error))
        digits.all_reduce = connections.all_reduce
    assert clipper.measure().norm.item() == pytest.approx(5**0.5)
    return met


def test_a_message_that_was_altered_on_its_way_is_noticed():
    for met in run_ranks(altered, 2, fresh=True):
        assert len(met) == 3
        assert all("altered on its way" in each for each in met)


def on_a_device() -> list[tuple[Tensor, float]]:
    """Norms there, and those by fractions; then one step, whose decision the host knows."""
    with on_the_accelerator():
        model = made([each for each in KINDS if not each[1].is_complex])
        model[2].grad = None
        whole = [raw(p.grad) for p in model.parameters() if p.grad is not None]
        found = []
        for p in P:
            clipper = Clipper(model, 1.0, norm_type=p, exact=True)
            found.append((raw(clipper.measure().norm).cpu(), nearest_norm(whole, p)))
        before, report = raw(model[0].grad).clone(), Clipper(model, 1.0, exact=True).clip_()
        assert 0 < report.coef.item() < 1
        assert torch.equal(raw(model[0].grad), before * report.coef.item())
    return found


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
@pytest.mark.parametrize("size", [1, 2])
def test_the_same_bits_on_an_accelerator(size):
    for found in run_ranks(on_a_device, size, fresh=True):
        assert all(torch.equal(norm, shown(oracle, norm.dtype)) for norm, oracle in found)


def one_fails() -> list[str]:
    met, rank = [], dist.get_rank()
    model = nn.Linear(3, 1)

    def clip(**other: float) -> None:
        passed = {"max_norm": 1.0, "norm_type": 2.0} | (other if rank == 1 else {})
        model.weight.grad, model.bias.grad = None if other == {"lacks": 1} and rank else torch.ones(1, 3), torch.ones(1)
        passed.pop("lacks", None)
        try:
            met.append(str(distclip.clip_grad_norm_(model, group=dist.group.WORLD, exact=True, **passed).item()))
        except ValueError as error:
            met.append(type(error).__name__)

    for other in ({"max_norm": -1.0}, {"norm_type": 0.0}, {"lacks": 1}, {}):
        clip(**other)
    return met


def test_a_rank_that_fails_stops_the_others():
    well, failing = run_ranks(one_fails, 2)
    assert well == ["LayoutError"] * 3 + ["2.0"]
    assert failing == ["ValueError", "ValueError", "LayoutError", "2.0"]
