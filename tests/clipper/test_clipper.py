"""The Clipper: measure, clip_, step; skipping, folding, state."""

import copy
from math import inf, nan

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import ASGD, SGD, Adagrad, Adam, AdamW, NAdam, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from support.layouts import build
from support.oracle import same_tensors, true_norm, whole_gradients
from support.ranks import same_bits
from support.roads import clipper_on_device

OPTIMIZERS = {
    "adam": lambda p: Adam(p, lr=0.1),
    "adamw": lambda p: AdamW(p, lr=0.1),
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd_momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "sgd_nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd_dampening": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "adagrad": lambda p: Adagrad(p, lr=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.1),
    "nadam": lambda p: NAdam(p, lr=0.1),
    "asgd": lambda p: ASGD(p, lr=0.1),
    "adam_fused": lambda p: Adam(p, lr=0.1, fused=True),
    "adamw_fused": lambda p: AdamW(p, lr=0.1, fused=True),
    "adamw_amsgrad_fused": lambda p: AdamW(p, lr=0.1, amsgrad=True, fused=True),
    "sgd_fused": lambda p: SGD(p, lr=0.1, fused=True),
    "sgd_momentum_fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "sgd_nesterov_fused": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True),
    "sgd_dampening_fused": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5, fused=True),
    "adagrad_fused": lambda p: Adagrad(p, lr=0.1, fused=True),
}


def fill(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    chance = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=chance, dtype=p.dtype) * scale


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def numbers(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return [v for entry in state.values() for v in entry.values() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("policy", [1.0, distclip.ValueClip(0.5)], ids=repr)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_first_step_never_was(clipper_of, name, policy):
    model, fresh = small(), small()
    optimizer, reference = (OPTIMIZERS[name](m.parameters()) for m in (model, fresh))
    clipper = clipper_of(model, policy)
    fill(model, 0)
    model[1].bias.grad[1] = nan
    assert clipper.step(optimizer).skip.item() is True
    assert same_tensors(list(model.parameters()), list(fresh.parameters()))

    fill(model, 1)
    fill(fresh, 1)
    report = clipper.step(optimizer)
    if policy == 1.0:
        nn.utils.clip_grad_norm_(fresh.parameters(), 1.0)
    else:
        nn.utils.clip_grad_value_(fresh.parameters(), 0.5)
    reference.step()
    assert report.skip.item() is False
    assert (report.coef.item() < 1) == (policy == 1.0)
    for mine, theirs in zip(
        [*model.parameters(), *numbers(optimizer)], [*fresh.parameters(), *numbers(reference)], strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bound", [0.5, 100.0])
def test_three_steps_are_clip_then_step(clipper_of, name, bound):
    model, reference = small(), small()
    optimizer, theirs = (OPTIMIZERS[name](m.parameters()) for m in (model, reference))
    clipper = clipper_of(model, bound)
    for step in range(3):
        fill(model, step)
        fill(reference, step)
        coef = clipper.step(optimizer).coef.item()
        nn.utils.clip_grad_norm_(reference.parameters(), bound)
        theirs.step()
        assert (coef < 1) == (bound == 0.5)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


class Scalings(TorchDispatchMode):
    """How many gradients were scaled in place by our own pass."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("aten::_foreach_mul_"):
            self.count += len(args[0])
        return func(*args, **(kwargs or {}))


def scalings(model, *optimizers, policy=0.1, clipper_of=distclip.Clipper) -> int:
    clipper = clipper_of(model, policy)
    fill(model, 0)
    with Scalings() as seen:
        clipper.step(*optimizers)
    return seen.count


def test_a_fused_optimizer_folds_and_others_do_not():
    model = small()
    count = len(list(model.parameters()))
    assert scalings(model, AdamW(model.parameters(), fused=True)) == 0
    assert scalings(model, SGD(model.parameters(), fused=True), policy=1e9) == 0
    assert scalings(model, SGD(model.parameters(), foreach=False)) == count

    class Mine(AdamW):
        pass

    assert scalings(model, Mine(model.parameters(), fused=True)) == count


def test_what_no_folding_optimizer_holds_is_scaled(clipper_of):
    model = small()
    held = SGD(model[0].parameters(), lr=0.0, fused=True)
    clipper = clipper_of(model, 0.1)
    fill(model, 0)
    before = whole_gradients(model.parameters())
    report = clipper.step(held)
    coef = report.coef.item()
    assert coef < 0.1
    for p, g in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, g * coef, rtol=1e-6, atol=0)


def test_several_optimizers_fold_and_scale_side_by_side(clipper_of):
    model, reference = small(), small()

    def pair(m):
        return AdamW(m[0].parameters(), lr=0.1, fused=True), RMSprop(m[1].parameters(), lr=0.1)

    optimizers, theirs = pair(model), pair(reference)
    clipper = clipper_of(model, 0.5)
    for step in range(2):
        fill(model, step)
        fill(reference, step)
        clipper.step(*optimizers)
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        for optimizer in theirs:
            optimizer.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def test_one_parameter_in_two_fused_optimizers_is_scaled_once():
    model = small()
    pair = SGD(model.parameters(), lr=0.0, fused=True), SGD(model[0].parameters(), lr=0.0, fused=True)
    assert scalings(model, *pair) == len(list(model.parameters()))
    assert true_norm(whole_gradients(model.parameters())) == pytest.approx(0.1, rel=1e-5)


def test_attributes_of_the_optimizer_are_as_before(clipper_of):
    model = small()
    optimizer = AdamW(model.parameters(), fused=True)
    before = dict(optimizer.__dict__)
    scalings(model, optimizer, clipper_of=clipper_of)
    assert optimizer.__dict__.keys() == before.keys()
    optimizer.grad_scale = mark = torch.tensor(1.0)

    def fail(*_):
        raise KeyError("hook")

    optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyError, match="hook"):
        scalings(model, optimizer, clipper_of=clipper_of)
    assert optimizer.grad_scale is mark
    assert "found_inf" not in optimizer.__dict__


def test_clip_leaves_the_bits_where_the_coefficient_is_one(clipper_of):
    model = small()
    fill(model, 0)
    before = whole_gradients(model.parameters())
    report = clipper_of(model, 1e3).clip_()
    assert report.to_dict() == {"norm": report.norm.item(), "max_norm": 1e3, "coef": 1.0, "skip": False}
    assert same_bits([before, whole_gradients(model.parameters())])


def test_clip_leaves_the_gradients_of_a_skipped_step(clipper_of):
    for policy in (0.1, distclip.ValueClip(0.1)):
        model = small()
        fill(model, 0)
        model[0].bias.grad[0] = inf
        before = whole_gradients(model.parameters())
        report = clipper_of(model, policy).clip_()
        assert (report.skip.item(), report.coef.item(), report.norm.item()) == (True, 1.0, inf)
        assert same_bits([before, whole_gradients(model.parameters())])


def test_value_clipping_clamps_and_steps(clipper_of):
    model = small()
    fill(model, 0)
    expected = [g.clamp(-0.2, 0.3) for g in whole_gradients(model.parameters())]
    before = [p.detach().clone() for p in model.parameters()]
    report = clipper_of(model, distclip.ValueClip((-0.2, 0.3))).step(SGD(model.parameters(), lr=1.0, fused=True))
    assert report.coef.item() == 1.0
    for p, b, e in zip(model.parameters(), before, expected, strict=True):
        torch.testing.assert_close(p.detach(), b - e)


LARGE = torch.tensor([-inf, -3e4, -1.0, 0.0, 2.0, 3e4, inf, nan])


class Bounds:
    """Element bounds, and a count of the steps that were decided."""

    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds

    def needs(self):
        return ()

    def init(self, units, device):
        return {"n": torch.zeros(())}

    def decide(self, statistics, state):
        return distclip.Decision(inf, bounds=self.bounds), {"n": state["n"] + 1}


@pytest.mark.parametrize("bounds", [(-1e5, 1e5), (-1.0, 1e39), (-1e300, 1.0), (-1e300, inf), (-65504.0, 65505.0)])
@pytest.mark.parametrize("how", ["ValueClip", "Decision", "function"])
def test_element_bounds_beyond_the_range_of_a_dtype_are_its_largest_numbers(how, bounds, clipper_of):
    low, high = bounds
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
    model = nn.ParameterList(nn.Parameter(torch.zeros(len(LARGE), dtype=dtype)) for dtype in dtypes)
    for p in model:
        parts = LARGE.to(p.dtype.to_real(), copy=True)
        p.grad = torch.complex(parts, -parts) if p.is_complex() else parts
    if how == "function":
        distclip.clip_grad_value_(model, bounds)
    else:
        policy = distclip.ValueClip(bounds) if how == "ValueClip" else Bounds(low, high)
        clipper_of(model, policy, nonfinite="propagate").clip_()
    for p in model:
        most = torch.finfo(p.dtype).max
        least = low if low == -inf else max(low, -most)
        largest = high if high == inf else min(high, most)
        expected = LARGE.to(p.dtype.to_real()).double().clamp(least, largest)
        grads = [p.grad.real, -p.grad.imag] if p.is_complex() else [p.grad]
        want = [expected, -(-LARGE.double()).clamp(least, largest)][: len(grads)]
        for grad, wanted in zip(grads, want, strict=True):
            assert torch.equal(grad.double().nan_to_num(7.0), wanted.to(grad.dtype).double().nan_to_num(7.0))


def test_a_step_with_bounds_beyond_the_range_counts_once(clipper_of):
    model = small().half()
    fill(model, 0)
    clipper = clipper_of(model, Bounds(-1e300, 1e5))
    before = whole_gradients(model.parameters())
    clipper.step(SGD(model.parameters(), lr=0.1))
    assert (clipper.steps, clipper.state_dict()["policy"]["n"].item()) == (1, 1.0)
    assert same_bits([before, whole_gradients(model.parameters())])


def test_measure_changes_nothing():
    model = small()
    clipper = distclip.Clipper(model, distclip.AutoClip(window=4, max_norm=0.5))
    fill(model, 0)
    gradients, state = whole_gradients(model.parameters()), copy.deepcopy(clipper.state_dict())
    measured = clipper.measure().to_dict()
    assert measured == clipper.measure().to_dict()
    assert same_bits([gradients, whole_gradients(model.parameters())])
    assert same_bits([state, clipper.state_dict()])
    assert clipper.clip_().to_dict() == measured
    assert clipper.state_dict()["steps"] == 1


def test_raise_names_the_culprit_and_touches_nothing(clipper_of):
    model = small()
    optimizer = AdamW(model.parameters(), fused=True)
    clipper = clipper_of(model, 1.0, nonfinite="raise")
    fill(model, 0)
    model[1].weight.grad[0, 0] = -inf
    before = whole_gradients(model.parameters())
    with pytest.raises(distclip.NonFiniteError, match=r"1\.weight on rank 0 has inf in its gradient"):
        clipper.step(optimizer)
    assert same_bits([before, whole_gradients(model.parameters())])
    assert not optimizer.state


def test_propagate_does_what_torch_does(clipper_of):
    model, reference = small(), small()
    for m in (model, reference):
        fill(m, 0)
        m[0].bias.grad[0] = nan
    assert clipper_of(model, 1.0, nonfinite="propagate").clip_().skip.item() is False
    nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    assert same_bits([whole_gradients(m.parameters()) for m in (model, reference)])
    optimizer = SGD(model.parameters(), lr=1.0, fused=True)
    clipper_of(model, 1.0, nonfinite="propagate").step(optimizer)
    assert all(p.isnan().all() for p in model.parameters())


def test_a_skip_is_reported_with_its_culprit(clipper_of):
    model = small()
    optimizer = AdamW(model.parameters(), fused=True)
    clipper = clipper_of(model, 1.0)
    fill(model, 0)
    model[0].weight.grad[0, 0] = nan
    report = clipper.step(optimizer)
    if clipper_of is clipper_on_device:  # known one call late
        assert report.culprit is None
        fill(model, 1)
        clipper.measure()
    else:
        assert report.culprit == clipper.culprit
    assert str(clipper.culprit) == "0.weight on rank 0 has NaN in its gradient"


def test_an_overflow_is_skipped_and_said():
    model = small().double()
    fill(model, 0)
    model[0].weight.grad[0, 0] = 1e200
    report = distclip.Clipper(model, 1.0).clip_()
    assert report.skip.item() is True
    assert report.culprit.kind == "overflow"
    before = whole_gradients(model.parameters())
    report = distclip.Clipper(model, 1.0, nonfinite="propagate").clip_()
    assert (report.skip.item(), report.coef.item()) == (False, 1.0)
    assert same_bits([before, whole_gradients(model.parameters())])


def test_one_optimizer_that_cannot_skip_by_itself_keeps_the_others_from_it():
    """Fused SGD with dampening keeps uninitialised momentum where it skips its first step: then nobody steps."""
    model = small()
    optimizers = [SGD(model[0].parameters(), lr=0.1, momentum=0.9, dampening=0.5, fused=True)]
    optimizers.append(torch.optim.AdamW(model[1].parameters(), lr=0.1, fused=True))
    clipper = clipper_on_device(model, 1.0)
    fill(model, 0)
    model[0].bias.grad[0] = nan
    before = [p.detach().clone() for p in model.parameters()]
    assert clipper.step(*optimizers).skip.item()
    assert same_bits([before, [p.detach() for p in model.parameters()]])
    assert not any(state for optimizer in optimizers for state in optimizer.state.values())


def test_a_loaded_state_leaves_what_was_before_it_behind():
    """The flags of a step that was not looked at yet are not counted in the state that was loaded since."""
    model = small()
    clipper = clipper_on_device(model, 1.0)
    state = clipper.state_dict()
    fill(model, 0)
    model[0].bias.grad[0] = nan
    clipper.clip_()
    clipper.load_state_dict(state)
    fill(model, 1)
    clipper.clip_()
    state = clipper.state_dict()
    assert (state["steps"], state["consecutive_skips"], state["history"]["nonfinite"]) == (1, 0, 0)
    assert clipper.culprit is None


def test_one_skip_in_a_row_can_be_all_that_is_allowed():
    model = small()
    clipper = distclip.Clipper(model, 1.0, max_consecutive_skips=1)
    fill(model, 0)
    model[0].bias.grad[0] = nan
    assert clipper.clip_().skip.item()
    with pytest.raises(distclip.NonFiniteError, match="2 steps in a row"):
        clipper.clip_()


def test_so_many_skips_in_a_row_and_no_more(clipper_of):
    model = small()
    optimizer = SGD(model.parameters(), lr=0.1, fused=True)
    clipper = clipper_of(model, 1.0, max_consecutive_skips=2)

    def step(bad: bool) -> None:
        fill(model, 0)
        if bad:
            model[0].bias.grad[0] = nan
        clipper.step(optimizer)

    for bad in (True, True, False, True, True):
        step(bad)
    if clipper_of is clipper_on_device:
        step(True)  # which the next call raises
    with pytest.raises(distclip.NonFiniteError, match=r"3 steps in a row.*0\.bias on rank 0 has NaN"):
        step(True)
    if clipper_of is distclip.Clipper:
        assert clipper.state_dict()["consecutive_skips"] == 3


def test_state_survives_and_decides_the_same():
    def run(clipper, model, steps):
        coefs = []
        for step in steps:
            fill(model, step, scale=1.0 + step % 5)
            coefs.append(clipper.clip_().coef.item())
        return coefs

    def made():
        model = small()
        return distclip.Clipper(model, distclip.AutoClip(percentile=30, window=7)), model

    clipper, model = made()
    whole = run(clipper, model, range(20))
    assert len(set(whole)) > 5
    first, model = made()
    head = run(first, model, range(9))
    second, model = made()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert head + run(second, model, range(9, 20)) == whole
    assert same_bits([second.state_dict(), clipper.state_dict()])


def test_the_state_is_a_copy():
    clipper = distclip.Clipper(small(), distclip.AutoClip(window=3))
    state = clipper.state_dict()
    state["policy"]["norms"].fill_(7.0)
    assert clipper.state_dict()["policy"]["norms"].tolist() == [inf] * 3
    clipper.load_state_dict(state)
    state["policy"]["norms"].fill_(8.0)
    assert clipper.state_dict()["policy"]["norms"].tolist() == [7.0] * 3


BAD_STATES = {
    "keys": lambda s: {"policy": s["policy"]},
    "another policy": lambda s: s | {"policy": {}},
    "shape": lambda s: s | {"policy": s["policy"] | {"norms": torch.zeros(4, dtype=torch.float64)}},
    "dtype": lambda s: s | {"policy": s["policy"] | {"norms": torch.zeros(3)}},
    "no dictionary": lambda s: 3,
    "no dictionary inside": lambda s: s | {"policy": None},
    "mixed keys": lambda s: s | {1: 2},
    "no tensor": lambda s: s | {"policy": s["policy"] | {"norms": [1.0, 2.0, 3.0]}},
    "no values": lambda s: s | {"policy": s["policy"] | {"count": torch.tensor(0, device="meta")}},
    "sparse": lambda s: s | {"policy": s["policy"] | {"norms": s["policy"]["norms"].to_sparse()}},
    "NaN": lambda s: s | {"policy": s["policy"] | {"norms": torch.full((3,), nan, dtype=torch.float64)}},
    "no number": lambda s: s | {"steps": "3"},
    "no whole number": lambda s: s | {"consecutive_skips": nan},
    "negative": lambda s: s | {"steps": -1},
    "beyond 64 bits": lambda s: s | {"steps": 10**400},
    "no history": lambda s: s | {"history": {}},
    "a history of NaN": lambda s: s | {"history": s["history"] | {"largest": nan}},
    "a history of less than nothing": lambda s: s | {"history": s["history"] | {"norms": -s["history"]["norms"] - 1}},
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(name):
    clipper = distclip.Clipper(small(), distclip.AutoClip(window=3))
    before = clipper.state_dict()
    with pytest.raises(ValueError, match="state"):
        clipper.load_state_dict(BAD_STATES[name](copy.deepcopy(before)))
    assert same_bits([before, clipper.state_dict()])


BAD_ARGUMENTS = {
    "nonfinite": lambda m: distclip.Clipper(m, 1.0, nonfinite="zero"),
    "max_consecutive_skips": lambda m: distclip.Clipper(m, 1.0, max_consecutive_skips=0),
    "norm_type": lambda m: distclip.Clipper(m, 1.0, norm_type=0),
    "max_norm": lambda m: distclip.Clipper(m, nan),
    "policy": lambda m: distclip.Clipper(m, distclip.MaxNorm),
    "model must be a module": lambda m: distclip.Clipper(m.parameters(), 1.0),
    r"step\(\) needs the optimizers": lambda m: distclip.Clipper(m, 1.0).step(),
    r"optimizers one by one, got list: step\(\*": lambda m: distclip.Clipper(m, 1.0).step([sgd(m)]),
    "one by one, got GradScaler": lambda m: distclip.Clipper(m, 1.0).step(sgd(m), torch.amp.GradScaler("cpu")),
    "one by one, got StepLR": lambda m: distclip.Clipper(m, 1.0).step(torch.optim.lr_scheduler.StepLR(sgd(m), 1)),
    "the same SGD twice": lambda m: distclip.Clipper(m, 1.0).step(*[sgd(m)] * 2),
    "call clip_.. in its closure": lambda m: distclip.Clipper(m, 1.0).step(torch.optim.LBFGS(m.parameters())),
}


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("says", BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_by_name(says):
    with pytest.raises(ValueError, match=says):
        BAD_ARGUMENTS[says](small())


def test_parts_of_a_model_are_clipped_together_and_named_apart():
    parts = [small(), small()]
    for seed, part in enumerate(parts):
        fill(part, seed)
    oracle = true_norm([g for part in parts for g in whole_gradients(part.parameters())])
    parts[1][0].bias.grad[0] = nan
    clipper = distclip.Clipper(parts, oracle / 2)
    assert clipper.clip_().culprit.parameter == "1.0.bias"
    fill(parts[1], 1)
    assert clipper.clip_().norm.item() == pytest.approx(oracle, rel=1e-7)
    assert true_norm([g for part in parts for g in whole_gradients(part.parameters())]) == pytest.approx(oracle / 2)


@pytest.mark.parametrize("name", ["policy", "max_norm", "report", "steps", "culprit"])
def test_what_is_read_only_says_its_name(name):
    clipper = distclip.Clipper(small(), 1.0)
    with pytest.raises(AttributeError, match=rf"^Clipper\.{name} is read-only: "):
        setattr(clipper, name, 2)
    with pytest.raises(AttributeError, match=rf"^Clipper\.{name} is read-only: "):
        delattr(clipper, name)


def test_a_clipper_of_no_engine_is_refused():
    with pytest.raises(ValueError, match=r"^Clipper\.of takes an Engine, got NoneType"):
        distclip.Clipper.of(None)


def test_a_number_of_numpy_is_a_bound():
    assert distclip.Clipper(small(), np.float32(0.5)).policy == distclip.MaxNorm(0.5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_float64_norm_whose_coefficient_leaves_float32_is_clipped(fused):
    """The coefficient was 0 in float32, and so were the gradients."""
    model = nn.Linear(2, 1, bias=False).double()
    optimizer = SGD(model.parameters(), lr=1.0, fused=fused)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[3e50, 4e50]], dtype=torch.float64)
    report = distclip.Clipper(model, 1.0).step(optimizer)
    assert report.coef.dtype == torch.float64
    assert report.coef.item() == pytest.approx(2e-51)
    assert (before - model.weight).tolist()[0] == pytest.approx([0.6, 0.8])


def test_missing_and_returning_gradients():
    model = build()
    clipper = distclip.Clipper(model, inf)
    assert clipper.measure().norm.item() == 0.0
    fill(model, 0)
    whole = clipper.measure().norm.item()
    model.head.weight.grad = None
    assert clipper.measure().norm.item() == pytest.approx(true_norm(whole_gradients(model.parameters())), rel=1e-7)
    fill(model, 0)
    assert clipper.measure().norm.item() == whole
