"""Policies around others in every layout: one all-reduce a step, and what one process makes of it; fused, too.

And without a wait on an accelerator that is not there.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import inf
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import distclip
from distclip import AGC, AdaGC, AutoClip, Chain, MaxNorm, PerGroup, PerParameter, Policy, Shadow, ValueClip
from distclip.step.decision import Outcome
from support import trained
from support.accelerator import EXISTS, counted_launches, no_waits, raw
from support.own_policy import OwnRunningMean, OwnSpikes
from support.ranks import count_collectives, run_ranks, same_bits
from support.roads import ROADS
from support.samples import rare
from support.trained import LR, united

SPIKES, BLOCKS, REST = OwnSpikes(3.0), "*blocks*", ("*embed*", "*head*")
STEPS, HALF = 8, 4
ALL = Chain(
    PerParameter(SPIKES),
    PerGroup({"blocks": (BLOCKS, SPIKES), "rest": (REST, None)}),
    Shadow(SPIKES, fixed=1.0, each=OwnRunningMean()),
    0.75,
)
LAYOUTS = [
    *((trained.one, 1), (trained.ddp, 2), rare(trained.fsdp2, 2), (trained.stages, 2), rare(trained.ddp, 4)),
    *((trained.fsdp2, 4), (trained.fsdp2_tp, 4), rare(trained.fsdp2_tp_sequence, 4), rare(trained.hsdp, 4)),
    rare(trained.stages, 4),
]


def train(layout, first: int, end: int, begun: dict[str, Any] | None = None, policy: Policy = ALL) -> dict[str, Any]:
    """Steps of SGD, from ``begun`` where there is such."""
    training = layout(begun and begun["weights"])
    optimizer = torch.optim.SGD([p for part in training.parts for p in part.parameters()], lr=LR)
    clipper = distclip.Clipper(training.parts, policy, **training.options)
    if begun:
        clipper.load_state_dict(begun["state"])
    rows, counts = [], []
    for step in range(first, end):
        training.backward(step)
        with count_collectives() as collectives:
            rows.append(clipper.step(optimizer).to_dict())
        counts.append(collectives["allreduce"])
        optimizer.zero_grad()
    return {"weights": united(training), "state": clipper.state_dict(), "rows": rows, "counts": counts}


class Spikes:
    """OwnSpikes by hand, for one norm."""

    def __init__(self) -> None:
        self.most = 0.0

    def decide(self, norm: float) -> tuple[float, bool, float]:
        """The coefficient, whether to skip, and what to remember if it is not skipped."""
        skip = self.most > 0 and norm > SPIKES.times * self.most
        bound = self.most or inf
        return min(1.0, bound / (norm + 1e-6)), skip, self.most if skip else max(norm, self.most)


def norm_of(gradients: Mapping[str, Tensor]) -> float:
    return sum(g.square().sum().item() for g in gradients.values()) ** 0.5


@lru_cache
def alone() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same in one process, without distclip: weights, and coefficients, skips and what spikes remember."""
    whole = trained.one()
    parameters = dict(whole.parts[0].named_parameters())
    each, block, model = {name: Spikes() for name in parameters}, Spikes(), Spikes()
    rows = []
    for step in range(STEPS):
        whole.backward(step)
        gradients = {name: p.grad for name, p in parameters.items()}
        before, answers = norm_of(gradients), []
        for name, own in each.items():
            answers.append((own, *own.decide(gradients[name].norm().item())))
            gradients[name] = gradients[name] * answers[-1][1]
        blocks = {name: g for name, g in gradients.items() if "blocks" in name}
        answers.append((block, *block.decide(norm_of(blocks))))
        gradients |= {name: g * answers[-1][1] for name, g in blocks.items()}
        answers.append((model, *model.decide(norm_of(gradients))))
        shadow = min(1.0, 1 / (norm_of(gradients) + 1e-6))
        gradients = {name: g * answers[-1][1] for name, g in gradients.items()}
        last = min(1.0, 0.75 / (norm_of(gradients) + 1e-6))
        gradients = {name: g * last for name, g in gradients.items()}
        skip = any(skips for _, _, skips, _ in answers)
        rows.append({"coef": 1.0 if skip else norm_of(gradients) / before, "skip": skip, "fixed/coef": shadow})
        for name, p in parameters.items():
            if not skip:
                p.data.sub_(LR * gradients[name])
            p.grad = None
        for own, _, _, most in answers:
            own.most = own.most if skip else most
    weights = {name: p.detach() for name, p in parameters.items()}
    return weights, {"rows": rows, "each": {name: own.most for name, own in each.items()}, "model": model.most}


def check(found: list[dict[str, Any]], first: int = 0) -> None:
    weights, wanted = alone()
    assert same_bits([(rank["state"], rank["rows"]) for rank in found])
    assert {True, False} == {row["skip"] for row in wanted["rows"]}, "a vacuous case"
    for row, other in zip(found[0]["rows"], wanted["rows"][first:], strict=True):
        assert {key: row[key] for key in other} == pytest.approx(other, rel=1e-9)
    for name, value in weights.items():
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-9, atol=1e-11)
    state = found[0]["state"]
    kept = dict(zip(state["units"]["parameter"], state["policy"]["0.most"].tolist(), strict=True))
    assert kept == pytest.approx(wanted["each"], rel=1e-9)
    assert state["policy"]["2.acting.most"].item() == pytest.approx(wanted["model"], rel=1e-9)


@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
def test_a_chain_of_everything_trains_as_one_process_by_one_all_reduce_a_step(layout, size):
    found = run_ranks(train, size, layout, 0, STEPS)
    check(found)
    if layout is not trained.fsdp2_tp_sequence:  # whose gradients are realigned
        assert {rank["counts"][k] for rank in found for k in (2, 4, 5)} == {1}, "copies are compared in calls 1, 2, 4"


ROUTES = [
    (trained.stages, 4, trained.one, 1),
    rare(trained.fsdp2, 4, trained.ddp, 2),
    rare(trained.one, 1, trained.stages, 4),
    (trained.ddp, 2, trained.fsdp2_tp, 4),
]


@pytest.mark.parametrize(("layout", "size", "later", "later_size"), ROUTES)
def test_its_state_goes_on_in_another_layout_on_other_ranks(layout, size, later, later_size):
    begun = run_ranks(train, size, layout, 0, HALF)[0]
    check(run_ranks(train, later_size, later, HALF, STEPS, begun), HALF)


def refused(policy: Any, road: str) -> str:
    training = trained.fsdp2()
    try:
        ROADS[road](training.parts, policy)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({"a": ("*weight", 1.0), "b": (BLOCKS, None)}, "blocks.0.0.weight is in the groups 'a' and 'b': give each p"),
        (
            {"a": ("nothing*", 1.0)},
            "the group 'a' is empty, no parameter matches 'nothing*': choose among embed.weight",
        ),
    ],
)
def test_groups_that_overlap_or_match_nothing_are_refused_on_all_ranks(groups, says, road):
    for said in run_ranks(refused, 2, PerGroup(groups), road):
        assert said.startswith(f"ValueError: {says}")


def other_policies() -> str:
    import torch.distributed as dist

    policy = Chain(PerGroup({"a": (BLOCKS, (1.0, 2.0)[dist.get_rank()])}), 1.0)
    return refused(policy, "host")


def test_ranks_with_other_policies_inside_are_told():
    for said in run_ranks(other_policies, 2):
        assert "PerGroup" in said
        assert "max_norm=1.0" in said
        assert "max_norm=2.0" in said


# ---- fused optimizers ---------------------------------------------------------------------------------------

FUSED = {  # whether a fused optimizer folds the one factor
    "model": (Chain(AutoClip(50, 4), 0.5, 0.25), True),
    "shadow": (Shadow(Chain(0.5, 0.25), own=PerParameter(1.0)), True),
    "one bound": (Chain(inf, 0.25), True),
    "each": (Chain(PerParameter(0.25), 0.5), False),
    "groups": (PerGroup({"blocks": (BLOCKS, 0.1), "rest": (REST, 0.2)}), False),
    "values": (Chain(0.5, ValueClip(0.01)), False),
}


def fused_and_not(name: str) -> tuple[float, list[bool]]:
    """How far weights are apart after steps of a fused and of a plain AdamW; whether the fused one scaled itself."""
    ends, folded = [], list[bool]()
    for fused in (True, False):
        training = trained.fsdp2()
        parameters = list(training.parts[0].parameters())
        optimizer = torch.optim.AdamW(parameters, lr=LR, fused=fused)
        clipper = distclip.Clipper(training.parts, FUSED[name][0])
        for step in range(4):
            training.backward(step)
            with patch.object(Outcome, "change", autospec=True, side_effect=Outcome.change) as change:
                coef = clipper.step(optimizer).coef
            folded += [not change.called] if fused and coef < 1 else []
            optimizer.zero_grad()
        ends.append(torch.cat([value.flatten() for value in united(training).values()]))
    return (ends[0] - ends[1]).abs().max().item(), folded


@pytest.mark.parametrize("name", FUSED)
def test_one_factor_folds_and_several_scale(name):
    for apart, folded in run_ranks(fused_and_not, 2, name):
        assert apart < 1e-6
        assert set(folded) == {FUSED[name][1]}


# ---- on an accelerator --------------------------------------------------------------------------------------

ON_DEVICE = {
    "trusted": Chain(PerParameter(1.0), AutoClip(50, 4), PerGroup({"a": ("0", 0.5), "b": ("1", None)}), 0.75),
    "own": Chain(PerParameter(SPIKES), PerGroup({"a": ("[01]", SPIKES), "b": ("2", None)}), SPIKES, inf),
    "shadows": Shadow(Chain(SPIKES, 1.0), a=0.5, b=PerParameter(SPIKES), c=PerGroup({"a": ("0", SPIKES)})),
    "each": PerParameter(Chain(SPIKES, Shadow(0.5, a=0.1))),
    "rows": Shadow(Chain(AGC(0.5), PerParameter(SPIKES), PerGroup({"a": ("[01]", 0.5)}), 1.0), a=AGC(), b=AdaGC()),
    "other groups": Chain(PerGroup({"a": ("0", 0.5)}), PerGroup({"b": ("[01]", 0.25)}), ValueClip(0.1)),
}


def without_waiting(name: str) -> list[tuple[dict[str, float], dict[str, float]]]:
    """What is reported on the device and on the host, step by step."""
    from promises.test_accelerator import fill, layers, on_the_accelerator

    found = []
    with on_the_accelerator():
        model = layers()
        twin = torch.nn.ParameterList(torch.nn.Parameter(raw(p.detach()).clone()) for p in model)
        clipper, other = distclip.Clipper(model, ON_DEVICE[name]), distclip.Clipper(twin, ON_DEVICE[name])
        for step in range(6):
            fill(model, step, scale=50.0 if step == 4 else 0.3)
            for p, mine in zip(twin, model, strict=True):
                p.grad = raw(mine.grad).clone()
            with no_waits():
                report = clipper.clip_()
            wanted = other.clip_().to_dict()
            for p, mine in zip(twin, model, strict=True):
                torch.testing.assert_close(raw(mine.grad), p.grad, rtol=1e-5, atol=0)
            numbers = {"norm": report.norm, "coef": report.coef, "skip": report.skip, **report.extra}
            found.append(({key: float(raw(value).item()) for key, value in numbers.items()}, wanted))
    return found


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
@pytest.mark.parametrize("name", ON_DEVICE)
def test_nothing_waits_and_the_device_decides_as_the_host_does(name):
    (rows,) = run_ranks(without_waiting, 1, name, fresh=True)
    for device, host in rows:
        assert device == pytest.approx({key: float(host[key]) for key in device}, rel=1e-6)
    assert min(device["coef"] for device, _ in rows) < 1
    assert name in ("trusted", "other groups", "rows") or any(
        value for row, _ in rows for k, value in row.items() if "skip" in k
    )


def launches_of(policies: list[Policy]) -> list[int]:
    """Kernels launched in one clip_() of each."""
    from promises.test_accelerator import fill, layers, on_the_accelerator

    counts = []
    with on_the_accelerator():
        for policy in policies:
            model = layers()
            clipper = distclip.Clipper(model, policy)
            for step in range(3):
                fill(model, step)
                with counted_launches() as launches:
                    clipper.clip_()
            counts.append(len(launches))
    return counts


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
def test_a_chain_of_one_launches_nothing_more():
    plain = [MaxNorm(1.0), AutoClip(50, 4), PerParameter(1.0)]
    (counts,) = run_ranks(
        launches_of, 1, [p for policy in plain for p in (policy, Chain(policy), Shadow(policy))], fresh=True
    )
    for k in range(0, len(counts), 3):
        assert counts[k] == counts[k + 1] == counts[k + 2]
