"""Policies around others: each in its place decides as it would alone, and what is wrong is refused by its name."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, nan
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import (
    AGC,
    AdaGC,
    AutoClip,
    Chain,
    Decision,
    MaxNorm,
    PerGroup,
    PerParameter,
    Shadow,
    Signal,
    Statistic,
    ValueClip,
)
from distclip.policies.adopt import spelled
from distclip.policies.trust import inner_of, is_trusted, name_of
from support.own_policy import OwnGate, OwnRunningMean, OwnSpikes
from support.roads import clipper_of as clipper_of

WEIGHTS = ("*.weight",)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()


def fill(net: nn.Module, step: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    """Gradients; a copy of them."""
    chance = torch.Generator().manual_seed(step)
    for p in net.parameters():
        p.grad = scale * torch.randn(p.shape, generator=chance, dtype=p.dtype)
    return gradients(net)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def norm(tensors: Mapping[str, Tensor], prefix: str = "") -> float:
    return sum(t.square().sum().item() for name, t in tensors.items() if name.startswith(prefix)) ** 0.5


@dataclass(frozen=True, slots=True)
class Mine:
    """Answers what it is told to."""

    answer: Any
    asks: tuple[Any, ...] = ()

    def needs(self):
        return self.asks

    def init(self, units, device):
        return {}

    def decide(self, statistics, state):
        return (self.answer(statistics) if callable(self.answer) else self.answer), state


@dataclass(frozen=True, slots=True)
class Scribbles:
    """Writes to all that it is shown."""

    def needs(self):
        return (Signal("loss"), Signal("tokens"))

    def init(self, units, device):
        return {"seen": torch.zeros(units.shape(), dtype=torch.float64, device=device)}

    def decide(self, statistics, state):
        after = {"seen": state["seen"] + 1}
        statistics.norm().fill_(nan)
        statistics.signal("loss").fill_(nan)
        state["seen"].fill_(nan)
        return Decision(inf), after


# ---- what they do -------------------------------------------------------------------------------------------


def test_each_of_a_chain_sees_what_those_before_it_leave(clipper_of):
    net = model()
    before = fill(net)
    report = clipper_of(net, Chain(PerParameter(1.0), PerGroup({"last": ("1.*", 0.5)}), 0.75)).clip_()
    wanted = {name: g * min(1.0, 1.0 / (g.norm().item() + 1e-6)) for name, g in before.items()}
    last = min(1.0, 0.5 / (norm(wanted, "1.") + 1e-6))
    wanted = {name: g * last if name.startswith("1.") else g for name, g in wanted.items()}
    assert norm(wanted) > 0.75
    after = gradients(net)
    for name, g in wanted.items():
        torch.testing.assert_close(after[name], g * 0.75 / (norm(wanted) + 1e-6), rtol=1e-12, atol=0)
    assert report.coef.item() == pytest.approx(0.75 / norm(before), rel=1e-5)
    assert report.norm.item() == pytest.approx(norm(before), rel=1e-12)


def test_different_groups_in_a_chain_are_combined_by_parameter(clipper_of):
    net = model()
    before = fill(net)
    clipper_of(net, Chain(PerGroup({"first": ("0.*", 1.0)}), PerGroup({"weights": (WEIGHTS, 0.5)}))).clip_()
    first = 1.0 / (norm(before, "0.") + 1e-6)
    left = {name: g * first if name.startswith("0.") else g for name, g in before.items()}
    weights = 0.5 / (norm({n: g for n, g in left.items() if n.endswith("weight")}) + 1e-6)
    for name, g in gradients(net).items():
        torch.testing.assert_close(g, left[name] * (weights if name.endswith("weight") else 1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("first", [True, False])
def test_what_is_in_no_group_is_scaled_by_the_others_of_a_chain(first, clipper_of):
    net = model()
    before = fill(net)
    policies = [1.0, PerGroup({"first": ("0.*", 0.25)})]
    clipper_of(net, Chain(*policies if first else policies[::-1])).clip_()
    after = gradients(net)
    left = before if first else {n: g * 0.25 / norm(before, "0.") if n[0] == "0" else g for n, g in before.items()}
    assert norm(after, "1.") == pytest.approx(norm(before, "1.") / norm(left), rel=1e-5)


def test_norms_of_rows_in_the_shadow_keep_no_chain_from_combining_by_parameter(clipper_of):
    net, ends = model(), []
    for first in (1.0, Shadow(1.0, rows=AGC())):
        before = fill(net)
        clipper_of(net, Chain(first, PerGroup({"biases": ("*.bias", 0.1)}))).clip_()
        ends.append(gradients(net))
    assert all(torch.allclose(g, ends[1][name], rtol=1e-12) for name, g in ends[0].items())
    assert norm(ends[0]) < norm(before)


def test_a_chain_inside_others_stays_in_its_place(clipper_of):
    net = model()
    before = fill(net)
    clipper_of(net, PerGroup({"first": ("0.*", Chain(2.0, OwnSpikes(), 0.5)), "rest": ("1.*", None)})).clip_()
    after = gradients(net)
    assert norm(after, "0.") == pytest.approx(0.5, rel=1e-5)
    assert all(torch.equal(after[name], g) for name, g in before.items() if name.startswith("1."))
    before = fill(net)
    clipper_of(net, PerParameter(Chain(1.0, 0.25))).clip_()
    for name, g in gradients(net).items():
        assert g.norm().item() == pytest.approx(min(before[name].norm().item(), 0.25), rel=1e-5)


@pytest.mark.parametrize(("road", "policy", "bound"), [("c", Chain(3.0, 1.0, 2.0), 1.0), ("p", Chain(inf, 1.5), 1.5)])
def test_a_chain_on_the_model_reports_the_least_bound(road, policy, bound, clipper_of):
    net = model()
    fill(net)
    assert clipper_of(net, policy).clip_().max_norm.item() == bound


SAME = {  # wrapped and plain, which do the same to the last bit
    "a chain of one": (Chain(AutoClip(50, 4)), AutoClip(50, 4)),
    "a number": (Chain(1.0), MaxNorm(1.0)),
    "no bound after it": (Chain(AutoClip(50, 4), inf), AutoClip(50, 4)),
    "no bound before it": (Chain(inf, 1.0), MaxNorm(1.0)),
    "values": (Chain(inf, ValueClip(0.1)), ValueClip(0.1)),
    "each parameter": (Chain(PerParameter(OwnSpikes()), inf), PerParameter(OwnSpikes())),
    "shadows": (
        Shadow(AutoClip(50, 4), own=OwnSpikes(), each=PerParameter(0.1), third=OwnRunningMean()),
        AutoClip(50, 4),
    ),
    "shadows of each": (Shadow(OwnRunningMean(), one=1.0), OwnRunningMean()),
}


@pytest.mark.parametrize("name", SAME)
def test_a_wrapper_that_adds_nothing_changes_no_bit(name, clipper_of):
    ends, watch = [], "parameters" if "shadow" in name else None  # sums of sums round otherwise than one sum
    for policy in SAME[name]:
        net, rows = model(), []
        clipper = clipper_of(net, policy, watch=watch)
        for step in range(7):
            fill(net, step, scale=10.0 if step == 5 else 1.0)
            report = clipper.clip_()
            rows.append((report.norm, report.max_norm, report.coef, report.skip, *gradients(net).values()))
        own = {key.rpartition(".")[2]: value for key, value in clipper.state_dict()["policy"].items()}
        if isinstance(policy, Shadow):
            acting = clipper.state_dict()["policy"].items()
            own = {key.removeprefix("acting."): value for key, value in acting if key.startswith("acting.")}
        ends.append((rows, own))
    (left, left_state), (right, right_state) = ends
    assert all(
        torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert left_state.keys() == right_state.keys()
    assert all(torch.equal(left_state[key], right_state[key]) for key in left_state)
    assert any(row[2] < 1 for row in left) or name in ("values",)


def test_a_shadow_says_what_the_others_would_have_done(clipper_of):
    net = model()
    policy = Shadow(1.0, less=0.5, each=PerParameter(0.25), spikes=OwnSpikes(), group=PerGroup({"first": ("0.*", 1.0)}))
    clipper = clipper_of(net, policy)
    fill(net)
    clipper.clip_()
    before = fill(net, 1, scale=100.0)
    found = clipper.clip_().to_dict()
    total = norm(before)
    assert found["coef"] == pytest.approx(1 / total, rel=1e-6)
    assert found["less/coef"] == pytest.approx(0.5 / total, rel=1e-6)
    assert found["each/coef"] == pytest.approx(0.5 / total, rel=1e-5)  # four parameters of 0.25
    first = (1.0 + norm(before, "1.") ** 2) ** 0.5
    assert found["group/coef"] == pytest.approx(first / total, rel=1e-5)
    assert (found["spikes/skip"], found["less/skip"], found["skip"]) == (1.0, 0.0, False)


def test_what_policies_report_keeps_its_name_or_gets_its_place(clipper_of):
    net = model()
    fill(net)
    telling = Mine(lambda statistics: Decision(inf, extra={"mine": 1, "norm²": statistics.norm() ** 2}))
    policy = Chain(Shadow(1.0, s=0.5), telling, telling, PerGroup({"first": ("0.*", Shadow(1.0, s=telling))}))
    extra = clipper_of(net, policy).clip_().extra
    assert {*extra} == {
        *("s/coef", "s/skip", "mine", "norm²", "2/mine", "2/norm²"),
        *("first/s/coef", "first/s/skip", "first/s/mine", "first/s/norm²"),
    }
    assert extra["norm²"].item() == pytest.approx(1.0, rel=1e-5)
    assert clipper_of(net, PerParameter(telling)).clip_().extra.keys() == {"mine"}  # of all parameters alike


# ---- skips and states ---------------------------------------------------------------------------------------


def stepped(clipper, net, scales) -> list[bool]:
    skips = []
    for step, scale in enumerate(scales):
        fill(net, step, scale)
        skips.append(bool(clipper.clip_().skip))
    return skips


@pytest.mark.parametrize(
    "policy",
    [
        Chain(OwnSpikes(4.0), AutoClip(50, 4)),
        Chain(AutoClip(100, 4), OwnSpikes(4.0)),
        PerGroup({"first": ("0.*", OwnSpikes(4.0)), "last": ("1.*", AutoClip(50, 4))}),
        Chain(PerParameter(OwnSpikes(4.0)), AutoClip(50, 4)),
    ],
    ids=str,
)
def test_a_step_that_one_skips_leaves_nothing_in_the_states_of_the_others(policy, clipper_of):
    net, other = model(), model()
    with_spike, without = clipper_of(net, policy), clipper_of(other, policy)
    assert stepped(with_spike, net, (1.0, 1.0)) == [False, False]
    stepped(without, other, (1.0, 1.0))
    before = fill(net, 2, 1000.0)
    assert with_spike.clip_().skip
    assert all(torch.equal(g, before[name]) for name, g in gradients(net).items())
    left, right = with_spike.state_dict()["policy"], without.state_dict()["policy"]
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_spike_of_one_parameter_skips_the_step_and_is_remembered_by_none(clipper_of):
    net = model()
    clipper = clipper_of(net, PerParameter(OwnSpikes(4.0)))
    stepped(clipper, net, (1.0,))
    before = clipper.state_dict()["policy"]["most"]
    fill(net, 0, 2.0)
    net[1].weight.grad *= 100
    assert clipper.clip_().skip
    assert torch.equal(clipper.state_dict()["policy"]["most"], before)
    fill(net, 0, 2.0)
    assert not clipper.clip_().skip
    assert torch.equal(clipper.state_dict()["policy"]["most"], 2 * before)


@dataclass(frozen=True, slots=True)
class Wants:
    """Skips as it is told, in one of the forms that a decision may have it in."""

    skip: Any

    def needs(self):
        return ()

    def init(self, units, device):
        return {"count": torch.zeros(units.shape(), dtype=torch.int64, device=device)}

    def decide(self, statistics, state):
        skip = self.skip(statistics.norm()) if callable(self.skip) else self.skip
        return Decision(inf, skip=skip), {"count": state["count"] + 1}


SKIPS = {
    "None": (None, False),
    "False": (False, False),
    "True": (True, True),
    "0": (0, False),
    "1.0": (1.0, True),
    "0-d": (lambda norm: (norm > 0).any(), True),
    "one": (lambda norm: (norm < 0).any().view(1), False),
    "float": (lambda norm: norm.new_ones(()), True),
    "each": (lambda norm: norm > 0, True),
    "none of each": (lambda norm: norm < 0, False),
}


@pytest.mark.parametrize(
    "wrap", [lambda p: Chain(p, 1.0), lambda p: Chain(1.0, p), PerParameter, lambda p: PerGroup({"a": ("0.*", p)})]
)
@pytest.mark.parametrize("name", SKIPS)
def test_a_skip_in_any_form_skips_the_step(name, wrap, clipper_of):
    skip, wanted = SKIPS[name]
    net = model()
    fill(net)
    clipper = clipper_of(net, wrap(Wants(skip)))
    assert bool(clipper.clip_().skip) == wanted
    (count,) = clipper.state_dict()["policy"].values()
    assert count.eq(1).all()  # of its own skip a policy may remember what it likes


def test_a_policy_that_writes_to_what_it_is_shown_disturbs_nobody(clipper_of):
    net = model()
    for policy in (Chain(Scribbles(), 1.0), Chain(Scribbles(), OwnGate(9.0)), Shadow(OwnGate(9.0), own=Scribbles())):
        before = fill(net)
        clipper = clipper_of(net, policy)
        report = clipper.clip_(signals={"loss": 1.0, "tokens": 2})
        assert report.norm.item() == pytest.approx(norm(before), rel=1e-12)
        assert norm(gradients(net)) == pytest.approx(1.0, rel=1e-5)
        assert report.to_dict().get("loss", 1.0) == 1.0
        assert all(not state.isnan().any() for state in clipper.state_dict()["policy"].values())


def test_states_have_the_names_of_their_places():
    policy = Chain(PerGroup({"a": ("0.*", Shadow(AutoClip(window=3), own=OwnSpikes()))}), Chain(OwnSpikes()), 1.0)
    state = distclip.Clipper(model(), policy).state_dict()["policy"]
    assert [*state] == ["0.a.acting.norms", "0.a.acting.count", "0.a.own.most", "1.0.most"]


def test_a_window_as_long_as_there_are_parameters_is_not_taken_for_theirs():
    """Loading a state whose parameters are in another order moves what is theirs, and nothing else."""
    policy = Chain(AutoClip(window=4), PerParameter(OwnSpikes()))
    clipper = distclip.Clipper(model(), policy)
    state = clipper.state_dict()
    state["policy"]["0.norms"] = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    state["policy"]["1.most"] = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    state["units"]["parameter"].reverse()
    clipper.load_state_dict(state)
    after = clipper.state_dict()["policy"]
    assert after["0.norms"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert after["1.most"].tolist() == [4.0, 3.0, 2.0, 1.0]


# ---- what is refused ----------------------------------------------------------------------------------------

REFUSED = {
    "values before": (lambda: Chain(ValueClip(1.0), 1.0), "ValueClip clamps elements, after which no norm is known"),
    "values before, nested": (lambda: Chain(Chain(2.0, ValueClip(1.0)), 1.0), r"Chain\(MaxNorm, ValueClip\) clamps"),
    "shadowed values": (lambda: Chain(Shadow(ValueClip(1.0), a=1.0), 1.0), r"Shadow\(ValueClip, MaxNorm\) clamps"),
    "values each": (lambda: PerParameter(ValueClip(1.0)), "PerParameter takes policies that decide on a norm, and Val"),
    "values of a group": (lambda: PerGroup({"a": ("*", Chain(ValueClip(1.0)))}), "PerGroup takes policies that decide"),
    "values as a shadow": (lambda: Shadow(1.0, a=ValueClip(1.0)), "ValueClip, which is not to act, clamps elements"),
    "each of each": (lambda: PerParameter(PerParameter(1.0)), r"PerParameter\(MaxNorm\) asks for norms of its own"),
    "each of a group": (lambda: PerGroup({"a": ("*", PerParameter(1.0))}), r"PerGroup gives .* per parameter.: use it"),
    "groups of each": (
        lambda: PerParameter(PerGroup({"a": ("*", 1.0)})),
        "asks for norms of its own .of gradients per g",
    ),
    "rows of each": (
        lambda: PerParameter(Mine(None, (Statistic("row"),))),
        "Mine asks for norms of its own .of gradients",
    ),
    "values of weights": (lambda: PerParameter(Mine(None, (Statistic(of="parameter"),))), "of parameters per model"),
    "a chain of them": (lambda: PerParameter(Chain(1.0, OwnRunningMean())), r"Chain\(MaxNorm, OwnRunningMean\) asks"),
    "no policy": (lambda: Chain(1.0, "zclip"), "policy must be a number or have needs"),
    "nothing": (Chain, "Chain needs at least one policy"),
    "no groups": (lambda: PerGroup({}), "PerGroup takes patterns and a policy for each group"),
    "a policy alone": (lambda: PerGroup({"a": 1.0}), "PerGroup takes patterns and a policy for each group"),
    "a list": (lambda: PerGroup([("a", "*", 1.0)]), "PerGroup takes patterns and a policy for each group"),
    "no patterns": (lambda: PerGroup({"a": ((), 1.0)}), "groups must be patterns by name"),
    "a dot": (lambda: PerGroup({"a.b": ("*", 1.0)}), "PerGroup needs names without dots, got 'a.b'"),
    "no text": (lambda: PerGroup({1: ("*", 1.0)}), "PerGroup needs names without dots, got 1"),
    "a dot in a shadow": (lambda: Shadow(1.0, **{"a.b": 1.0}), "Shadow needs names without dots, got 'a.b'"),
    "acting twice": (lambda: Shadow(1.0, acting=2.0), "Shadow takes the acting policy first"),
    "a bound of 0": (lambda: Chain(1.0, 0), "max_norm must be above 0"),
    "needs of none": (lambda: PerParameter(Mine(None, None)), "Mine.needs returned None"),
    "needs of a chain": (lambda: distclip.Clipper(model(), Chain(Mine(None, None), 1.0)), "Mine.needs returned None"),
    "overlap": (
        lambda: distclip.Clipper(model(), PerGroup({"a": ("0.*", 1.0), "b": (WEIGHTS, None)})),
        "0.weight is in the groups 'a' and 'b': give each parameter to one group",
    ),
    "no match": (
        lambda: distclip.Clipper(model(), Chain(1.0, PerGroup({"a": ("2.*", 1.0)}))),
        r"the group 'a' is empty, no parameter matches '2\.\*'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_known_is_refused_at_construction(name):
    build, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        build()


FOUR = torch.tensor([1.0, 2.0, -1.0, 1.0], dtype=torch.float64)
BAD = {
    "in a chain": (Chain(Mine(Decision(-1.0)), 1.0), r"^Mine.decide returned max_norm = -1.0, and no step"),
    "last in a chain": (Chain(1.0, Mine(Decision(inf, coef=nan))), r"^Mine.decide returned coef = nan, and no step"),
    "a group": (
        PerGroup({"a": ("0.*", Mine(Decision(-1.0)))}),
        r"^Mine.decide returned max_norm = -1.0 for the group 'a'",
    ),
    "a parameter": (
        PerParameter(Mine(lambda _: Decision(FOUR))),
        r"^PerParameter\(Mine\).decide returned (a )?max_norm.* for 1.weight \(unit 2 of 4\)",
    ),
    "a parameter in a chain": (
        PerParameter(Chain(Mine(lambda _: Decision(FOUR)), 1.0)),
        r"^Mine.decide returned max_norm = -1.0 for 1.weight \(unit 2 of 4\)",
    ),
    "a parameter after others": (
        Chain(1.0, Mine(Decision(FOUR, per="parameter"), (Statistic("parameter"),))),
        r"^Mine.decide returned max_norm = -1.0 for 1.weight \(unit 2 of 4\)",
    ),
    "no decision": (Chain(1.0, Mine(None)), r"^Mine.decide returned \['NoneType', 'dict'\]"),
    "no decision alone": (Chain(Mine(None)), r"^Mine.decide returned \['NoneType', 'dict'\]"),
    "no decision of each": (PerParameter(Mine(3)), r"^Mine.decide returned \['int', 'dict'\]"),
    "a shadow": (Shadow(1.0, own=Mine(Decision(0.0))), r"^Mine.decide returned max_norm = 0.0, and no step was made"),
    "another level": (Chain(1.0, Mine(Decision(1.0, per="row"))), r"^Mine.decide returned per = 'row', and no step"),
    "a level in a group": (
        Chain(PerParameter(1.0), PerGroup({"a": ("0.*", Mine(Decision(1.0, per="parameter")))})),
        r"^Mine.decide returned per = 'parameter' inside PerGroup, and no step was made: decide on the norm that it is",
    ),
    "values too early": (
        Chain(Mine(Decision(inf, bounds=(-1, 1))), 1.0),
        r"^Mine clamps elements, after which no norm",
    ),
    "values of a group": (
        PerGroup({"a": ("*", Mine(Decision(inf, bounds=(-1, 1))))}),
        r"^PerGroup takes policies that",
    ),
    "values of each": (
        PerParameter(Mine(Decision(inf, bounds=(-1, 1)))),
        r"^PerParameter takes policies that decide on",
    ),
    "values of a shadow": (Shadow(1.0, own=Mine(Decision(inf, bounds=(-1, 1)))), r"^Shadow reports coefficients, and"),
    "bad values": (
        Chain(1.0, Mine(Decision(inf, bounds=(1, 2)))),
        r"^Chain\(MaxNorm, Mine\).decide returned bounds = ",
    ),
    "a name of the report's": (Chain(Mine(Decision(1.0, extra={"coef": 1.0})), 1.0), r"^Mine.decide returned extra = "),
    "no number": (Mine(Decision(1.0, extra={"a": "b"})), r"^Mine.decide returned extra = 'b'"),
    "no names": (Mine(Decision(1.0, extra=[1.0])), r"^Mine.decide returned extra = \[1.0\]"),
    "a skip": (Chain(Mine(Decision(1.0, skip="yes")), 1.0), r"^Mine.decide returned skip = 'yes'"),
    "two numbers": (
        Chain(Mine(Decision(torch.ones(2))), 1.0),
        r"^Mine.decide returned max_norm = a dense tensor of sha",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_inside_is_named_and_touches_nothing(name):
    policy, says = BAD[name]
    net = model()
    before = fill(net)
    clipper = distclip.Clipper(net, policy)
    with pytest.raises(ValueError, match=says):
        clipper.clip_()
    assert all(torch.equal(g, before[key]) for key, g in gradients(net).items())


@pytest.mark.parametrize("bad", [nan, inf])
def test_of_a_norm_that_is_not_finite_any_answer_will_do(bad, clipper_of):
    net = model()
    for inner in (Mine(Decision(-1.0)), Mine(Decision(inf, coef=nan))):
        for policy in (Chain(inner, 1.0), PerGroup({"a": ("*", inner)}), PerParameter(inner), Shadow(1.0, own=inner)):
            fill(net)
            for p in net.parameters():
                p.grad[0] = bad
            assert clipper_of(net, policy).clip_().skip


@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("coef", [nan, 0.0, -1.0])
def test_nor_does_one_for_units_matter_then(bad, coef, clipper_of):
    net, each = model(), Statistic("parameter")
    inner = Mine(lambda s: Decision(inf, coef=torch.full_like(s.norm(each), coef), per=each), (each,))
    for policy in (Chain(inner, 1.0), Shadow(1.0, own=inner)):
        fill(net)
        net[0].weight.grad[1, 1] = bad
        assert clipper_of(net, policy).clip_().skip


PROPAGATING = {
    "warm-up": AdaGC(),
    "of the model after units": Chain(PerParameter(0.1), 1.0),
    "of rows": Chain(AGC(), 1.0),
    "of units after the model": Chain(1.0, PerParameter(AutoClip(10, 4))),
    "of groups after the model": Chain(1.0, PerGroup({"a": ("*.bias", 0.1)})),
}


@pytest.mark.parametrize("name", PROPAGATING)
def test_a_norm_of_nan_propagates_into_every_gradient(name, clipper_of):
    net = model()
    fill(net)
    net[0].weight.grad[1, 1] = nan
    report = clipper_of(net, PROPAGATING[name], nonfinite="propagate").clip_()
    assert not report.skip
    assert all(p.grad.isnan().all() for p in net.parameters()), "as in torch"


# ---- who they are -------------------------------------------------------------------------------------------


def test_what_two_shadows_report_by_one_name_is_told_apart(clipper_of):
    net = model()
    before = norm(fill(net))
    extra = clipper_of(net, Shadow(Shadow(1.0, a=0.5), a=0.25)).clip_().extra
    assert [round(extra[name].item() * before, 3) for name in ("acting/a/coef", "a/coef")] == [0.5, 0.25]
    with pytest.raises(ValueError, match="take another than 'norm'"):  # to_dict has norms that are watched there
        Shadow(1.0, norm=0.5)


def test_wrappers_are_trusted_as_far_as_what_is_inside():
    trusted = Chain(1.0, PerParameter(AutoClip()), Shadow(1.0, a=2.0), PerGroup({"a": ("*", 1.0), "b": ("c", None)}))
    assert is_trusted(trusted)
    for policy in (Chain(1.0, OwnSpikes()), PerParameter(OwnSpikes()), Shadow(1.0, own=Chain(OwnSpikes()))):
        assert not is_trusted(policy)
    assert name_of(Chain(1.0, PerGroup({"a": ("*", OwnSpikes())}))) == "Chain(MaxNorm, PerGroup(OwnSpikes))"
    assert not inner_of(OwnSpikes())


class Louder(MaxNorm):
    inner: ClassVar = {"": None}


def test_a_subclass_is_neither_trusted_nor_looked_into():
    assert not is_trusted(Louder(1.0))
    assert name_of(Louder(1.0)) == "Louder"


DIFFERENT = [
    *(Chain(1.0), Chain(1.0, 2.0), Chain(2.0, 1.0), Chain(Chain(1.0), 2.0), PerParameter(1.0), PerParameter(2.0)),
    *(
        PerGroup({"a": ("*", 1.0)}),
        PerGroup({"b": ("*", 1.0)}),
        PerGroup({"a": ("?", 1.0)}),
        PerGroup({"a": ("*", None)}),
    ),
    *(Shadow(1.0), Shadow(1.0, a=1.0), Shadow(1.0, b=1.0), Shadow(1.0, a=OwnSpikes()), Shadow(1.0, a=OwnSpikes(5.0))),
]


def test_ranks_see_whether_their_policies_are_the_same():
    assert len({spelled(policy) for policy in DIFFERENT}) == len(DIFFERENT)
    assert [spelled(pickle.loads(pickle.dumps(policy))) for policy in DIFFERENT] == list(map(spelled, DIFFERENT))
    assert spelled(PerGroup({"a": ("*", 1.0)})) == spelled(PerGroup({"a": (["*"], MaxNorm(1.0))}))
