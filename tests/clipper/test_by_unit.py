"""Steps by unit on one rank, on both roads: whatever gradients, optimizers and options there are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import Clipper, Decision, Statistic
from distclip.gradients.storage import Storage
from distclip.step.engine import Engine
from support.oracle import same_tensors
from support.ranks import same_bits

GROUPS = Statistic("group", groups={"first": "0", "third": "2"})
SHAPES = ((4, 3), (5,), (2, 3, 2))


@dataclass(frozen=True)
class Answers:
    """Decides for each unit of a level what it is made with; a list is one number for each."""

    per: str | Statistic = "parameter"
    answer: dict[str, Any] = field(default_factory=dict)

    def needs(self):
        return (distclip.Statistic(self.per) if isinstance(self.per, str) else self.per,)

    def init(self, units, device):
        return {"decided": torch.zeros(units.shape(self.per), dtype=torch.float64, device=device)}

    def decide(self, statistics, state):
        norms = statistics.norm(self.per)
        tensors = {k: norms.new_tensor(v) if isinstance(v, list) else v for k, v in self.answer.items()}
        return Decision(**{"max_norm": inf, "per": self.per, **tensors}), {"decided": state["decided"] + 1}


def answers(per: str | Statistic = "parameter", **answer: Any) -> Answers:
    return Answers(per, answer)


def model_of(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> nn.ParameterList:
    """With gradients."""
    torch.manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes)
    for p in model:
        p.grad = torch.randn(p.shape, dtype=torch.float64).to(dtype)
    return model


def copies(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def norms(model: nn.Module) -> list[float]:
    return [p.grad.to(torch.complex128 if p.is_complex() else torch.float64).norm().item() for p in model.parameters()]


DTYPES = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.complex64: 1e-6}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_has_its_bound_afterwards_or_its_bits(clipper_of, dtype):
    model = model_of(dtype)
    before, kept = norms(model), copies(model)
    report = clipper_of(model, answers(max_norm=[0.5, inf, 0.25])).clip_()
    after = norms(model)
    assert after == pytest.approx([0.5, before[1], 0.25], rel=4 * DTYPES[dtype])
    assert torch.equal(model[1].grad, kept[1])
    whole = [torch.tensor(numbers).norm().item() for numbers in (after, before)]
    assert report.coef.item() == pytest.approx(whole[0] / whole[1], rel=4 * DTYPES[dtype])
    assert report.max_norm.item() == inf


def test_parameters_of_no_group_keep_their_bits(clipper_of):
    model = model_of()
    kept = copies(model)
    clipper_of(model, answers(GROUPS, max_norm=[inf, 0.5])).clip_()
    assert same_tensors(kept[:2], [model[0].grad, model[1].grad])
    assert model[2].grad.norm().item() == pytest.approx(0.5, rel=4e-6)


@pytest.mark.parametrize("answer", [{"max_norm": 1e9}, {"coef": [1.0, 1.0, 1.0]}, {"max_norm": inf}])
@pytest.mark.parametrize("bad", [0.0, nan, inf])
def test_a_coefficient_is_exactly_1_where_nothing_is_scaled(clipper_of, bad, answer):
    model = model_of()
    if bad:
        model[0].grad[0, 0] = bad
        answer = {"max_norm": inf}
    kept = copies(model)
    report = clipper_of(model, answers(**answer), nonfinite="propagate").clip_()
    assert report.coef.item() == 1.0
    assert same_tensors(kept[1:], copies(model)[1:])
    assert torch.equal(kept[0].nan_to_num(), model[0].grad.nan_to_num())


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_step_that_is_skipped_for_one_unit_scales_none(clipper_of, bad):
    model = model_of()
    model[0].grad[0, 0] = bad
    kept = copies(model)
    clipper = clipper_of(model, answers(max_norm=0.1))
    report = clipper.clip_()
    assert (report.skip.item(), report.coef.item()) == (True, 1.0)
    assert torch.equal(kept[0].nan_to_num(), model[0].grad.nan_to_num())
    assert same_tensors(kept[1:], copies(model)[1:])
    assert clipper.state_dict()["policy"]["decided"].tolist() == [1.0, 1.0, 1.0]


def test_nonfinite_raise_changes_nothing(clipper_of):
    model = model_of()
    model[2].grad[0] = nan
    kept = copies(model)
    clipper = clipper_of(model, answers(max_norm=0.1), nonfinite="raise")
    with pytest.raises(distclip.NonFiniteError, match="2 on rank 0 has NaN"):
        clipper.clip_()
    assert same_tensors(kept[:2], copies(model)[:2])
    assert clipper.state_dict()["policy"]["decided"].tolist() == [0.0, 0.0, 0.0]


def test_nonfinite_propagate_bounds_the_other_units(clipper_of):
    model = model_of()
    model[0].grad[0, 0] = nan
    report = clipper_of(model, answers(max_norm=[-1.0, 0.1, 0.2]), nonfinite="propagate").clip_()
    assert report.norm.isnan()
    assert report.coef.isnan()
    assert not report.skip
    assert norms(model)[1:] == pytest.approx([0.1, 0.2], rel=2e-5)
    assert model[0].grad.isnan().all(), "as torch does with all of them"


def test_a_coefficient_of_inf_for_a_unit_that_is_not_finite_ends_nothing(clipper_of):
    model = model_of()
    model[0].grad[0, 0] = inf
    kept = copies(model)
    clipper_of(model, answers(coef=[inf, 0.5, 0.25]), nonfinite="propagate").clip_()
    assert torch.equal(model[1].grad, kept[1] * 0.5)
    assert torch.equal(model[2].grad, kept[2] * 0.25)


@pytest.mark.parametrize("skip", [True, [1.0]])
def test_a_policy_that_skips_scales_nothing(clipper_of, skip):
    model = model_of()
    kept = copies(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model]
    report = clipper_of(model, answers(max_norm=0.1, skip=skip)).step(optimizer)
    assert (report.skip.item(), report.coef.item()) == (True, 1.0)
    assert same_tensors(kept, copies(model))
    assert same_tensors(before, list(model))


@pytest.mark.parametrize("bounds", [(-0.01, 0.02), ([-0.01], [0.02])], ids=["numbers", "tensors"])
def test_element_bounds_come_after_the_factors_of_units(clipper_of, bounds):
    model = model_of()
    kept = copies(model)
    bounds = tuple(torch.tensor(b[0]) if isinstance(b, list) else b for b in bounds)
    clipper_of(model, answers(coef=[0.01, 1.0, 0.25], bounds=bounds)).clip_()
    for p, gradient, coef in zip(model, kept, (0.01, 1.0, 0.25), strict=True):
        torch.testing.assert_close(p.grad, (gradient * coef).clamp(-0.01, 0.02))


def test_measure_changes_nothing(clipper_of):
    model = model_of()
    kept, clipper = copies(model), clipper_of(model, answers("row", max_norm=0.1), watch="parameters")
    report = clipper.measure()
    assert report.coef.item() < 0.5
    assert same_tensors(kept, copies(model))
    assert not clipper.state_dict()["policy"]["decided"].any()
    assert clipper.clip_().coef.item() == report.coef.item()


def test_tiny_factors_lose_nothing_where_the_host_knows_them():
    model = model_of()
    for p in model:
        p.grad.fill_(1e30)
    report = Clipper(model, answers(max_norm=[1e-10, inf, 1e-20])).clip_()
    assert norms(model) == pytest.approx([1e-10, 1e30 * 5**0.5, 1e-20], rel=1e-6)
    assert 0 < report.coef.item() < 1


def test_tiny_factors_zero_nothing_where_the_device_decides(clipper_of):
    model = model_of()
    for p in model:
        p.grad.fill_(1e30)
    assert clipper_of(model, answers(coef=1e-60)).clip_().coef.item() > 0
    assert min(norms(model)) > 0


def test_rows_of_a_gradient_that_is_sparse_or_channels_last_are_bounded(clipper_of):
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4, sparse=True), "conv": nn.Conv2d(3, 4, 2)})
    model["embed"](torch.tensor([1, 1, 4])).square().sum().backward()
    weight = model["conv"].weight
    model["conv"].bias.grad = torch.full((4,), 1e-3)
    weight.grad = torch.randn_like(weight).to(memory_format=torch.channels_last)
    stride = weight.grad.stride()
    clipper_of(model, answers("row", max_norm=0.1)).clip_()
    assert model["embed"].weight.grad.to_dense().norm(dim=1).tolist() == pytest.approx(
        [0, 0.1, 0, 0, 0.1, 0, 0], rel=1e-4
    )
    assert weight.grad.flatten(1).norm(dim=1).tolist() == pytest.approx([0.1] * 4, rel=1e-4)
    assert weight.grad.stride() == stride
    assert model["conv"].bias.grad.tolist() == pytest.approx([1e-3] * 4)


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "fused sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
    "fused adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.1),
}


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_with_gradients_that_were_scaled_by_unit(clipper_of, name, scale):
    """And the scaler of one step of three, which is not finite, skips it."""
    model, other = model_of(), model_of()
    optimizer, beside = OPTIMIZERS[name](model), OPTIMIZERS[name](other)
    clipper = clipper_of(model, answers(max_norm=[0.1, inf, 0.2]))
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    for step in range(3):
        for k, (p, q) in enumerate(zip(model, other, strict=True)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + k))
            q.grad = p.grad.clone()
        for k, bound in ((0, 0.1), (2, 0.2)):
            other[k].grad.mul_(min(1.0, bound / (other[k].grad.norm().item() + 1e-6)))
        if step == 1:
            model[2].grad.view(-1)[3] = inf
        if scaler is not None:
            scaler.scale(torch.ones(()))  # makes its scale
            for p in model:
                p.grad.mul_(scaler.get_scale())
        report = clipper.step(optimizer, scaler=scaler)
        if scaler is not None:
            scaler.update()
            assert scaler.get_scale() == (scale if step < 1 else scale / 2)
        assert report.skip.item() == (step == 1)
        if step != 1:
            beside.step()
    for p, q in zip(model, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


ROADS = pytest.mark.parametrize("decides_on_device", [False, True], ids=["host", "device"])


@ROADS
@pytest.mark.parametrize("per", ["parameter", "row", GROUPS])
def test_an_outcome_scales_its_gradients_and_copies_of_them_later(per, decides_on_device):
    model, later = model_of(), model_of()
    model[1].grad = later[1].grad = None
    engine = Engine(model, answers(per, max_norm=0.1), decides_on_device=decides_on_device)
    outcome = engine.decide()
    kept, given = [p.grad.clone() for p in model if p.grad is not None], list(outcome.gradients)
    assert same_tensors(kept, given)
    outcome.apply_to(given)
    lasting = outcome.without_gradients()
    assert not lasting.gradients
    lasting.apply_to(kept)
    Clipper(later, answers(per, max_norm=0.1)).clip_()
    wanted = [p.grad for p in later if p.grad is not None]
    assert same_tensors(wanted, kept)
    assert same_tensors(wanted, given)


@ROADS
def test_an_outcome_by_unit_is_refused_for_another_number_of_gradients(decides_on_device):
    model = model_of()
    outcome = Engine(model, answers(max_norm=0.1), decides_on_device=decides_on_device).decide()
    with pytest.raises(ValueError, match="a factor for each of 3 gradients, and was to be applied to 2: hand outcome"):
        outcome.apply_to([model[0].grad, model[1].grad])
    assert same_tensors(copies(model), copies(model_of()))


@pytest.mark.parametrize("per", ["parameter", "row"])
@pytest.mark.parametrize("shapes", [(), ((0, 3),)], ids=["no parameter", "an empty one"])
@pytest.mark.parametrize("p", [2.0, inf])
@pytest.mark.filterwarnings("ignore:no gradient on this rank:RuntimeWarning")
def test_a_model_without_elements_has_units_without_numbers(clipper_of, shapes, per, p):
    model = model_of(shapes=shapes)
    clipper = clipper_of(model, answers(per, max_norm=0.1), norm_type=p)
    report = clipper.clip_()
    assert (report.norm.item(), report.coef.item()) == (0.0, 1.0)
    units = len(shapes) if per == "parameter" else 0
    assert clipper.state_dict()["policy"]["decided"].tolist() == [1.0] * units


@ROADS
@pytest.mark.parametrize("per", ["parameter", "row"])
def test_gradients_behind_a_loss_scale_are_scaled_by_unit_before_a_buffer_of_all_is_unscaled(per, decides_on_device):
    model, plain = model_of(), model_of()
    policy = answers(per, max_norm=0.1, bounds=(-0.02, 0.03))
    buffer = torch.cat([p.grad.flatten() for p in model]).mul_(64.0)
    views = [part.view(p.shape) for part, p in zip(buffer.split([p.numel() for p in model]), model, strict=True)]
    storage = Storage(lambda: views, views.__setitem__, scale=lambda: 64.0)
    outcome = Engine(model, policy, gradients=storage, decides_on_device=decides_on_device).decide()
    settled = outcome.scaled_by_unit().without_gradients()
    settled.apply_to([buffer], unscale=True)
    assert same_bits([settled.report.coef, outcome.report.coef])
    Clipper(plain, policy).clip_()
    torch.testing.assert_close(buffer, torch.cat([p.grad.flatten() for p in plain]), rtol=1e-6, atol=1e-9)
