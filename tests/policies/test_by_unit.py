"""MaxRMS, AdaGC and AGC one by one: published formulas, their corners, and what they refuse."""

from contextlib import nullcontext
from functools import partial
from math import inf, nan, sqrt

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import AGC, AdaGC, Chain, MaxNorm, MaxRMS, PerGroup, PerParameter, Shadow
from promises.test_accelerator import on_the_accelerator
from support.accelerator import DEVICE, EXISTS, no_waits, raw
from support.oracle import rows_in
from support.ranks import run_ranks

BY_UNIT = [MaxRMS(), AdaGC(), AGC()]


class Net(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up = nn.Embedding(5, 4), nn.ConvTranspose1d(4, 3, 2)
        self.conv, self.head = nn.Conv2d(4, 6, 3), nn.Linear(4, 2)
        self.w2 = nn.Parameter(torch.randn(2, 3, 4))
        for p in self.parameters():
            p.data = torch.randn(p.shape) * scale
            p.grad = torch.randn(p.shape) * torch.rand(p.shape[:1]).view(-1, *[1] * (p.ndim - 1))


def clipped(policy, model: nn.Module) -> tuple[dict[str, Tensor], distclip.Report]:
    report = distclip.Clipper(model, policy).clip_()
    return {name: p.grad for name, p in model.named_parameters()}, report


# ---- published formulas -------------------------------------------------------------------------------------


def timm_unitwise_norm(x: Tensor) -> Tensor:
    """timm.utils.agc, 1.0."""
    return x.norm(2.0) if x.ndim <= 1 else x.norm(2.0, dim=tuple(range(1, x.ndim)), keepdim=True)


def timm_agc(p: Tensor, gradient: Tensor, clip_factor: float = 0.01, eps: float = 1e-3) -> Tensor:
    max_norm = timm_unitwise_norm(p).clamp_(min=eps).mul_(clip_factor)
    grad_norm = timm_unitwise_norm(gradient)
    clipped_grad = gradient * (max_norm / grad_norm.clamp(min=1e-6))
    return torch.where(grad_norm < max_norm, gradient, clipped_grad)


def optax_norm(x: Tensor) -> Tensor:
    """optax.adaptive_grad_clip, 0.2: inputs come first there, of a convolution as of a matrix."""
    if x.squeeze().ndim <= 1:
        return x.square().sum().sqrt()
    dims = {2: (0,), 3: (0,), 4: (0, 1, 2)}[x.ndim]
    return x.square().sum(dim=dims, keepdim=True).sqrt()


def optax_agc(p: Tensor, gradient: Tensor, clipping: float = 0.01, eps: float = 1e-3) -> Tensor:
    g_norm, max_norm = optax_norm(gradient), clipping * optax_norm(p).clamp(min=eps)
    return torch.where(g_norm < max_norm, gradient, gradient * (max_norm / g_norm.clamp(min=1e-6)))


def optax_block_rms(gradient: Tensor, threshold: float) -> Tensor:
    """optax.clip_by_block_rms, 0.2."""
    return gradient / (gradient.square().mean().sqrt() / threshold).clamp(min=1.0)


def test_agc_is_timms_but_where_outputs_are_not_along_dim_0():
    """Which timm takes for outputs in transposed convolutions and in experts too."""
    model = Net()
    wanted = {name: timm_agc(p.detach(), p.grad.clone(), 0.3) for name, p in model.named_parameters()}
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    found, _ = clipped(AGC(0.3), model)
    assert any(torch.equal(found[name], before[name]) for name in found), "a vacuous case"
    differ = {name for name in found if not torch.allclose(found[name], wanted[name], rtol=1e-6)}
    assert differ == {"up.weight", "w2"}
    as_timm, _ = clipped(AGC(0.3, unit_dims={"up.weight": 0, "w2": 0}), Net())
    for name, gradient in as_timm.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-6, atol=0)


def test_agc_is_optaxs_on_transposed_weights():
    model = Net()
    names = ["head.weight", "head.bias", "conv.weight", "conv.bias"]
    parameters = dict(model.named_parameters())
    wanted = {}
    for name in names:
        p, gradient = parameters[name].detach(), parameters[name].grad.clone()
        if p.ndim == 1:
            wanted[name] = optax_agc(p, gradient)
        else:  # (out, in, h, w) to (h, w, in, out)
            order = (1, 0) if p.ndim == 2 else (2, 3, 1, 0)
            back = (1, 0) if p.ndim == 2 else (3, 2, 0, 1)
            wanted[name] = optax_agc(p.permute(order), gradient.permute(order)).permute(back)
    found, _ = clipped(AGC(), model)
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=0)


def test_max_rms_is_optaxs_block_rms():
    model = Net()
    wanted = {name: optax_block_rms(p.grad.clone(), 0.5) for name, p in model.named_parameters()}
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    found, _ = clipped(MaxRMS(0.5), model)
    assert 0 < sum(torch.equal(found[name], before[name]) for name in found) < len(found), "a vacuous case"
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-6, atol=0)


def test_the_rms_of_a_complex_parameter_is_that_of_absolute_values():
    model = nn.ParameterList([nn.Parameter(torch.zeros(4, dtype=torch.complex64))])
    model[0].grad = torch.full((4,), 3 + 4j)
    clipped(MaxRMS(2.5), model)
    torch.testing.assert_close(model[0].grad.abs(), torch.full((4,), 2.5))


# ---- corners ------------------------------------------------------------------------------------------------


def test_under_agc_a_parameter_of_zeros_moves():
    model = Net(scale=0.0)
    found, _ = clipped(AGC(), model)
    for gradient in found.values():
        for row in rows_in(gradient) if gradient.ndim == 2 else []:
            assert row.norm().item() == pytest.approx(0.01 * 1e-3, rel=1e-5)


@pytest.mark.parametrize("exempt", ["head.*", ["head.weight", "head.bias"]], ids=str)
def test_what_is_exempt_from_agc_keeps_its_bits(exempt):
    model = Net(scale=0.0)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    found, _ = clipped(AGC(exempt=exempt), model)
    assert {name for name in found if torch.equal(found[name], before[name])} == {"head.weight", "head.bias"}


def test_agc_bounds_rows_along_the_dims_that_are_named():
    model = Net(scale=0.0)
    found, _ = clipped(AGC(unit_dims={"w2": (0, 2), "conv.weight": ()}), model)
    norms = [row.norm().item() for row in rows_in(found["w2"], (0, 2))] + [found["conv.weight"].norm().item()]
    assert norms == pytest.approx([1e-5] * 9, rel=1e-5)


@pytest.mark.parametrize("value", [nan, inf])
def test_values_that_are_not_finite_leave_agc_an_answer(value):
    model = nn.Linear(2, 2)
    model.weight.data = torch.tensor([[value, 1.0], [3.0, 4.0]])
    model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.zeros(2)
    clipped(AGC(), model)
    first = sqrt(2) if value == inf else 1e-5
    assert model.weight.grad.norm(dim=1).tolist() == pytest.approx([first, 0.05], rel=1e-5)


def steps(policy, gradients: list[list[float]]) -> tuple[list[list[float]], dict]:
    """Norms of parameters of one element each after clipping, step by step; and the state after them."""
    model = nn.ParameterList(nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in gradients[0])
    clipper, found = distclip.Clipper(model, policy), []
    for numbers in gradients:
        for p, number in zip(model, numbers, strict=True):
            p.grad = torch.tensor([number], dtype=torch.float64)
        clipper.clip_()
        found.append([p.grad.item() for p in model])
    return found, clipper.state_dict()["policy"]


def test_adagc_by_hand():
    found, state = steps(AdaGC(5.0, 2.0, 0.5, 2), [[3, 4], [6, 8], [6, 8], [16, 2]])
    assert found == [pytest.approx(each) for each in ([3, 4], [3, 4], [6, 8], [9, 2])]
    assert state["means"].tolist() == pytest.approx([(4.5 + 9) / 2, (6 + 2) / 2])
    assert state["count"].item() == 4


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize("bad", [nan, inf])
def test_a_step_that_is_not_finite_is_none_for_adagc(bad, step):
    good = [[3, 4], [6, 8], [6, 8], [16, 2]]
    _, wanted = steps(AdaGC(5.0, 2.0, 0.5, 2), good)
    _, state = steps(AdaGC(5.0, 2.0, 0.5, 2), [*good[:step], [bad, 1.0], *good[step:]])
    assert state["means"].tolist() == wanted["means"].tolist()
    assert state["count"].item() == 4


def test_a_parameter_that_gets_no_gradient_in_the_warm_up_of_adagc_has_its_own():
    found, state = steps(AdaGC(5.0, 2.0, 0.5, 1), [[5, 0], [5, 0], [6, 8], [1, 1]])
    assert found == [pytest.approx(each) for each in ([5, 0], [5, 0], [6, 4], [1, 1])]
    assert state["means"].tolist() == pytest.approx([3.25, 2.5])


def test_a_parameter_without_gradients_for_a_while_keeps_its_mean_under_adagc():
    _, state = steps(AdaGC(warm_up=0), [[0.5, 0.5], *[[0.5, 0.0]] * 5])
    assert state["means"].tolist() == pytest.approx([0.5, 0.5])


def test_without_a_warm_up_adagc_starts_from_the_first_step():
    found, state = steps(AdaGC(1.0, 1.5, 0.5, 0), [[3, 4], [3, 4]])
    assert found == [pytest.approx(each) for each in ([0.6, 0.8], [0.9, 1.2])]
    assert state["means"].tolist() == pytest.approx([0.75, 1.0])


def test_a_damaged_mean_is_none():
    model = nn.ParameterList([nn.Parameter(torch.zeros(1))])
    clipper = distclip.Clipper(model, AdaGC(warm_up=0))
    state = clipper.state_dict()
    state["policy"]["means"][0] = -1.0
    clipper.load_state_dict(state)
    model[0].grad = torch.ones(1)
    clipper.clip_()
    assert model[0].grad.item() == 1.0
    assert clipper.state_dict()["policy"]["means"].tolist() == [1.0]


@pytest.mark.parametrize("exponent", [-40, 40])
def test_adagc_after_its_warm_up_and_agc_scale_with_powers_of_two(exponent):
    """And so do MaxRMS and the warm-up, where their bounds do."""
    by, numbers = 2.0**exponent, [[3, 4], [6, 8], [6, 9], [16, 2]]
    found, _ = steps(AdaGC(5.0, 2.0, 0.5, 2), numbers)
    scaled, _ = steps(AdaGC(5.0 * by, 2.0, 0.5, 2), [[by * n for n in each] for each in numbers])
    assert scaled == [[by * n for n in each] for each in found]


# ---- inside others ------------------------------------------------------------------------------------------


def test_adagc_before_a_bound_on_the_model():
    model = Net()
    found, report = clipped(Chain(AdaGC(lambda_abs=2.0), MaxNorm(1.0)), model)
    assert sqrt(sum(g.square().sum().item() for g in found.values())) == pytest.approx(1.0, rel=1e-5)
    assert report.coef < 1


def test_agc_and_others_in_the_shadow_of_each_other():
    report = clipped(Shadow(AGC(exempt="head.*"), rms=MaxRMS(0.1), ada=AdaGC(), all=AGC()), Net())[1]
    assert 0 < report.extra["all/coef"] < report.coef
    assert {"rms/coef", "ada/coef"} <= report.extra.keys()


@pytest.mark.parametrize("policy", BY_UNIT, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("wrap", [PerParameter, lambda policy: PerGroup({"all": ("*", policy)})])
def test_none_is_for_the_norm_of_others(policy, wrap):
    with pytest.raises(ValueError, match=rf" {type(policy).__name__} asks for norms of its own .* in a Chain"):
        wrap(policy)


# ---- what is refused ----------------------------------------------------------------------------------------


REFUSED = {
    "max_rms": lambda: MaxRMS(0),
    "lambda_abs": lambda: AdaGC(lambda_abs=-1),
    "lambda_rel": lambda: AdaGC(lambda_rel=0.99),
    "lambda_rel must be finite": lambda: AdaGC(lambda_rel=inf),
    "beta": lambda: AdaGC(beta=1),
    "warm_up": lambda: AdaGC(warm_up=1.5),
    "clipping": lambda: AGC(0),
    "eps": lambda: AGC(eps=0),
    "eps must be finite": lambda: AGC(eps=inf),
    "exempt": lambda: AGC(exempt=[3]),
    "unit_dims": lambda: AGC(unit_dims={"w": -1}),
}


@pytest.mark.parametrize("field", REFUSED)
def test_settings_that_mean_nothing_are_refused_by_their_names(field):
    with pytest.raises(ValueError, match=f"^{field}[ ,]"):
        REFUSED[field]()


@pytest.mark.parametrize("p", [1.0, 3.0, inf])
@pytest.mark.parametrize("policy", [MaxRMS(), AGC()], ids=str)
def test_those_of_squares_are_refused_for_other_norms(policy, p):
    says = f"{type(policy).__name__} is defined for norm_type=2 alone, got norm_type={p}"
    with pytest.raises(ValueError, match=says):
        distclip.Clipper(Net(), policy, norm_type=p)


def test_adagc_takes_any_norm():
    model = Net()
    distclip.Clipper(model, AdaGC(lambda_abs=0.5), norm_type=inf).clip_()
    assert max(p.grad.abs().max().item() for p in model.parameters()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (AGC(exempt="lm_head.weight"), "the group 'exempt' is empty, no parameter matches 'lm_head.weight': choose"),
        (AGC(unit_dims={"w1": 0}), "no parameter matches 'w1' in dims: choose among"),
        (Chain(AGC(), AGC(unit_dims={"w2": 0})), "two statistics want rows along different dimensions"),
    ],
    ids=["exempt", "unit_dims", "two"],
)
def test_patterns_that_match_nothing_and_rows_of_two_kinds_are_refused(policy, says):
    with pytest.raises(ValueError, match=says):
        distclip.Clipper(Net(), policy)


# ---- an accelerator ---------------------------------------------------------------------------------------------


POLICIES = {
    "rms": MaxRMS(0.5),
    "adagc": AdaGC(2.0, 1.05, 0.5, 2),
    "agc": AGC(0.3, exempt="head.*"),
    "agc along": AGC(0.3, unit_dims={"w2": 2, "head.weight": 1}),  # (0, 2) asks for strides, which are not simulated
}


def four_steps(policy, device: str) -> list[Tensor]:
    """Gradients after four steps, one of which is not finite."""
    model, found = Net(), []
    gradients = [p.grad.clone() for p in model.parameters()]
    model.to(device)
    clipper = distclip.Clipper(model, policy)
    for step in range(4):
        for k, (p, gradient) in enumerate(zip(model.parameters(), gradients, strict=True)):
            p.grad = (gradient * (nan if step == 1 and k == 0 else 1 + step * (k % 3))).to(device)
        with nullcontext() if step == 2 else no_waits():  # which asks who made the norm before it NaN
            clipper.clip_()
        found += [raw(p.grad).clone() for p in model.parameters()]
    return found


def on_both() -> list[str]:
    """Which differ."""
    host = {name: four_steps(policy, "cpu") for name, policy in POLICIES.items()}
    with on_the_accelerator():
        device = {name: four_steps(policy, DEVICE) for name, policy in POLICIES.items()}
    same = partial(torch.allclose, equal_nan=True)
    return [name for name in POLICIES if not all(map(same, host[name], device[name]))]


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
def test_an_accelerator_clips_as_the_host_does_without_a_wait():
    assert run_ranks(on_both, 1, fresh=True) == [[]]
