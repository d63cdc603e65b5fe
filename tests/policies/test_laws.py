"""Laws of policies around others, over random gradients, bounds and compositions in one process."""

import os
from math import inf
from random import Random

import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from distclip import (
    AutoClip,
    Chain,
    Clipper,
    MaxNorm,
    PerGroup,
    PerParameter,
    Policy,
    QuantileTracker,
    Shadow,
    SkipSpikes,
    Smooth,
    ValueClip,
    Warmup,
    ZClip,
)
from support.own_policy import OwnRunningMean, OwnSpikes

EXAMPLES = int(os.environ.get("LAW_EXAMPLES", "30"))
law = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
NAMES = ("a", "b", "c", "d")

bounds = st.floats(1e-3, 1e3).map(MaxNorm)
adaptive = st.sampled_from(
    [
        *(AutoClip(10, 3), AutoClip(50, 4), AutoClip(100, 2), ZClip(max_norm=inf, warmup_steps=2)),
        *(SkipSpikes(sigma=3.0, window=4, patience=2), ZClip(alpha=0.5, z_thresh=1.5, max_norm=inf, warmup_steps=3)),
    ]
)
on_a_norm = (
    bounds | adaptive | st.sampled_from([OwnSpikes(4.0), Smooth(2.0), QuantileTracker(), MaxNorm(Warmup(9, 1, 3))])
)


def around(inner: st.SearchStrategy[Policy]) -> st.SearchStrategy[Policy]:
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda policies: Chain(*policies)),
        st.tuples(inner, inner).map(lambda pair: Shadow(pair[0], other=pair[1])),
    )


def grouped(inner: st.SearchStrategy[Policy]) -> st.SearchStrategy[Policy]:
    return st.tuples(inner, inner | st.none()).map(
        lambda two: PerGroup({"x": (("a", "b"), two[0]), "y": ("c", two[1])})
    )


def composed(leaf: st.SearchStrategy[Policy]) -> st.SearchStrategy[Policy]:
    """Of policies on a norm, around each other in all ways."""
    norms = st.recursive(leaf, around, max_leaves=3)
    return st.recursive(norms | norms.map(PerParameter) | grouped(norms), around, max_leaves=4)


class Model:
    """Four parameters, whose gradients are random at each step."""

    def __init__(self, policy: Policy | float, **options: object) -> None:
        sizes = ((3, 2), (5,), (2, 2), (1,))
        self.parameters = {
            n: nn.Parameter(torch.zeros(s, dtype=torch.float64)) for n, s in zip(NAMES, sizes, strict=True)
        }
        self.clipper = Clipper(nn.ParameterDict(self.parameters), policy, **options)

    def step(
        self, seed: int, scale: float = 1.0
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float | bool]]:
        """Gradients before and after, and the report."""
        chance, factors = torch.Generator().manual_seed(seed), Random(seed)
        for p in self.parameters.values():
            noise = torch.randn(p.shape, generator=chance, dtype=p.dtype)
            p.grad = noise * scale * 2.0 ** factors.randrange(-4, 5)
        before = {name: p.grad.clone() for name, p in self.parameters.items()}
        return before, *self.again()

    def again(self) -> tuple[dict[str, Tensor], dict[str, float | bool]]:
        report = self.clipper.clip_().to_dict()
        return {name: p.grad.clone() for name, p in self.parameters.items()}, report


seeds = st.integers(0, 2**31)


@law
@given(composed(on_a_norm), seeds)
def test_directions_stay_and_no_norm_grows(policy, seed):
    model = Model(policy)
    for step in range(4):
        before, after, report = model.step(seed + step)
        for name, g in before.items():
            factor = after[name].norm() / g.norm()
            assert factor <= 1 + 1e-15
            torch.testing.assert_close(after[name], factor * g, rtol=1e-12, atol=0)
        assert report["coef"] <= 1
        assert not report["skip"] or all(torch.equal(after[name], g) for name, g in before.items())


@law
@given(composed(bounds), seeds)
def test_fixed_bounds_change_next_to_nothing_a_second_time(policy, seed):
    model = Model(policy)
    _, once, _ = model.step(seed, scale=1e3)
    twice, report = model.again()
    assert report["coef"] >= 1 - 2e-2
    for name, g in once.items():
        assert (twice[name] - g).abs().max() <= 1e-5 + 1e-5 * g.abs().max()


@law
@given(composed(on_a_norm), seeds)
def test_zero_gradients_stay_zero_and_leave_nothing(policy, seed):
    model, other = Model(policy), Model(policy)
    model.step(seed)
    other.step(seed)
    _, after, report = model.step(seed, scale=0.0)
    assert not any(g.any() for g in after.values())
    assert (report["norm"], report["skip"]) == (0.0, False)
    states = [each.clipper.state_dict()["policy"] for each in (model, other)]
    learnt = {
        name: value for name, value in states[0].items() if not name.endswith("step")
    }  # schedules count all steps
    assert all(torch.equal(value, states[1][name]) for name, value in learnt.items())


@law
@given(composed(adaptive), seeds, st.integers(-30, 30))
def test_adaptive_policies_do_the_same_to_gradients_times_a_power_of_two(policy, seed, exponent):
    plain, scaled = Model(policy), Model(policy)
    for step in range(6):
        _, after, report = plain.step(seed + step)
        _, same, other = scaled.step(seed + step, scale=2.0**exponent)
        assert (report["coef"], report["skip"]) == (other["coef"], other["skip"])
        assert all(torch.equal(same[name], 2.0**exponent * g) for name, g in after.items())


def same(left: Policy, right: Policy, seed: int, of_right: str = "", of_left: str = "") -> None:
    """Same bits of gradients and reports, and of the parts of states whose names begin so."""
    models = Model(left, watch="parameters"), Model(right, watch="parameters")
    for step in range(4):
        one, other = (model.step(seed + step) for model in models)
        assert all(torch.equal(g, other[1][name]) for name, g in one[1].items())
        assert all(one[2][name] == other[2][name] for name in ("norm", "max_norm", "coef", "skip"))
    states = [model.clipper.state_dict()["policy"] for model in models]
    assert states[1]
    for name, value in states[1].items():
        assert torch.equal(states[0][of_left + name.removeprefix(of_right)], value)


with_state = composed(on_a_norm).map(lambda policy: Chain(OwnSpikes(9.0), policy))


@law
@given(with_state, seeds)
def test_a_chain_of_one_is_that_one(policy, seed):
    same(Chain(policy), policy, seed, of_left="0.")


@law
@given(with_state, seeds)
def test_no_bound_after_a_policy_changes_nothing(policy, seed):
    same(Chain(policy, MaxNorm(inf)), policy, seed, of_left="0.")


@law
@given(with_state, composed(on_a_norm), seeds)
def test_a_shadow_changes_nothing_of_what_acts(policy, other, seed):
    same(Shadow(policy, other=other, each=OwnRunningMean()), policy, seed, of_left="acting.")


@law
@given(composed(on_a_norm), seeds)
def test_values_after_a_policy_are_clamped_as_by_themselves(policy, seed):
    scaled, clamped = Model(policy), Model(Chain(policy, ValueClip(0.25)))
    for step in range(3):
        _, one, report = scaled.step(seed + step)
        _, other, _ = clamped.step(seed + step)
        if not report["skip"]:
            one = {name: g.clamp(-0.25, 0.25) for name, g in one.items()}
        assert all(torch.equal(g, other[name]) for name, g in one.items())
