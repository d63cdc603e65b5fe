"""A policy from elsewhere that bounds each parameter by its own history trains as in one process, in every layout.

It is resumed in another, by the names of its units: support/own_policy.py, against a loop without distclip.
"""

import re
from functools import lru_cache
from math import inf
from typing import Any

import pytest
import torch
import torch.distributed as dist

import distclip
from promises.test_accelerator import EXISTS, adamw, fill, layers, on_the_accelerator
from support import trained
from support.accelerator import counted_waits, raw
from support.own_policy import OwnRunningMean
from support.ranks import count_collectives, run_ranks, same_bits
from support.samples import most, rare
from support.trained import alone, united

HALF, STEPS = 4, 8
POLICY = OwnRunningMean()
NETS = {
    1: [trained.one, trained.ddp, trained.fsdp2],
    2: [trained.ddp, trained.fsdp2, trained.fsdp1, trained.stages, trained.stages_of_equal_names],
    4: [
        *(trained.ddp, trained.fsdp2, trained.hsdp, trained.fsdp2_tp, trained.fsdp2_tp_sequence),
        *(trained.fsdp1, trained.fsdp1_flat, trained.stages, trained.stages_of_equal_names),
    ],
}
EXPERTS = {
    1: [trained.all_experts],
    2: [trained.experts, trained.experts_of_equal_names, trained.experts_by_dtensor],
    4: [trained.experts, trained.experts_of_equal_names, trained.experts_by_dtensor],
}
CASES = most(
    [
        pytest.param(layout, size, id=f"{layout.__name__}-{size}")
        for of in (NETS, EXPERTS)
        for size, layouts in of.items()
        for layout in layouts
    ],
    *("ddp-1", "fsdp2-1", "ddp-2", "fsdp2-2", "fsdp1-2", "stages-2", "fsdp2_tp-4", "fsdp1_flat-4", "stages-4"),
    *("experts_of_equal_names-2", "experts_by_dtensor-2", "experts-4"),
)


def train(layout, first: int, end: int, begun: dict[str, Any] | None = None) -> dict[str, Any]:
    """Steps of SGD, from ``begun`` where there is such: weights and state after them, and what was reported."""
    training = layout(begun and begun["weights"])
    optimizer = torch.optim.SGD([p for part in training.parts for p in part.parameters()], lr=trained.LR)
    clipper = distclip.Clipper(training.parts, POLICY, **training.options)
    if begun:
        clipper.load_state_dict(begun["state"])
    coefs, counts = [], []
    for step in range(first, end):
        training.backward(step)
        with count_collectives() as collectives:
            coefs.append(clipper.step(optimizer).coef.item())
        counts.append(collectives["allreduce"])
        optimizer.zero_grad()
    return {
        "weights": united(training),
        "state": clipper.state_dict(),
        "coefs": coefs,
        "counts": counts,
        "units": training.units,
    }


@lru_cache
def in_one_process(of_experts: bool) -> tuple[dict[str, torch.Tensor], dict[str, float], int]:
    whole = trained.all_experts() if of_experts else trained.one()
    return alone(whole, range(STEPS), POLICY.times, POLICY.beta)


def check(found: list[dict[str, Any]], of_experts: bool) -> None:
    """As one process ends."""
    weights, means, clipped = in_one_process(of_experts)
    assert 0 < clipped < STEPS * len(weights), "a vacuous case"
    assert same_bits([rank["state"] for rank in found])
    for name, value in weights.items():
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-9, atol=1e-11)
    assert found[0]["weights"].keys() == weights.keys()
    state, units = found[0]["state"], found[0]["units"]
    kept = dict(zip(state["units"]["parameter"], state["policy"]["mean"].tolist(), strict=True))
    assert kept == pytest.approx({units.get(name, name): mean for name, mean in means.items()}, rel=1e-9)


@pytest.mark.parametrize(("layout", "size"), CASES)
def test_each_parameter_is_bounded_by_its_own_history(layout, size):
    found = run_ranks(train, size, layout, 0, STEPS)
    check(found, "experts" in layout.__name__)
    assert same_bits([rank["coefs"] for rank in found])
    assert found[0]["coefs"][0] == 1.0
    assert min(found[0]["coefs"]) < 1
    if layout is not trained.fsdp2_tp_sequence:  # whose gradients are realigned
        assert {rank["counts"][k] for rank in found for k in (2, 4, 5)} == {1}, "copies are compared in calls 1, 2, 4"


ROUTES = [
    (trained.fsdp2_tp, 4, trained.one, 1),
    (trained.fsdp1_flat, 4, trained.one, 1),
    (trained.stages, 4, trained.fsdp2, 2),
    (trained.one, 1, trained.stages, 4),
    (trained.stages_of_equal_names, 4, trained.stages_of_equal_names, 2),
    (trained.experts, 4, trained.experts_by_dtensor, 2),
    (trained.experts_of_equal_names, 4, trained.experts_of_equal_names, 2),
    *[rare(layout, 4, trained.one, 1) for layout in (trained.hsdp, trained.stages)],
    *[rare(layout, 4, trained.fsdp2, 2) for layout in (trained.ddp, trained.fsdp2_tp_sequence)],
    rare(trained.fsdp2, 2, trained.stages, 2),
    rare(trained.experts, 4, trained.all_experts, 1),
    rare(trained.all_experts, 1, trained.experts, 4),
]


@pytest.mark.parametrize(("layout", "size", "later", "later_size"), ROUTES)
def test_a_run_goes_on_in_another_layout_on_other_ranks(layout, size, later, later_size):
    begun = run_ranks(train, size, layout, 0, HALF)[0]
    check(run_ranks(train, later_size, later, HALF, STEPS, begun), "experts" in layout.__name__)


def refused(layout, begun: dict[str, Any]) -> tuple[str, bool, float]:
    """What loading says, whether the state is as before, and the coefficient of a step after that."""
    training = layout(begun["weights"])
    clipper = distclip.Clipper(training.parts, POLICY, **training.options)
    before = clipper.state_dict()
    try:
        clipper.load_state_dict(begun["state"])
    except ValueError as error:
        kept = same_bits([before, clipper.state_dict()])
        training.backward(HALF)
        return str(error), kept, clipper.clip_().coef.item()
    return "", False, 0.0


@pytest.mark.parametrize(
    ("layout", "later", "says"),
    [
        (trained.stages_of_equal_names, trained.one, "lacks blocks.0.0.weight, .*, and has blocks.0.0.weight.pp=0., "),
        (trained.one, trained.stages_of_equal_names, "lacks blocks.0.0.weight.pp=0., .* and has blocks"),
        (trained.experts_of_equal_names, trained.all_experts, r"and has experts.0.w.ep=0., experts.1.w.ep=0., "),
        (trained.ddp, trained.experts, r"lacks dense.weight, dense.bias, experts.0.w and 3 more, and has embed.weight"),
    ],
)
def test_what_has_other_units_is_refused_by_their_names_on_all_ranks(layout, later, says):
    begun = run_ranks(train, 4 if layout is not trained.one else 1, layout, 0, 1)[0]
    begun["weights"] = None
    for message, kept, coef in run_ranks(
        refused, 1 if later in (trained.one, trained.all_experts) else 2, later, begun
    ):
        assert message.startswith("this state is of other parameters than this Clipper's: it lacks ")
        assert message.endswith("load it into a Clipper of the model it was saved from")
        assert re.search(says, message)
        assert kept
        assert coef == 1.0


def loaded_apart() -> str:
    """A state whose means are swapped on the last rank alone: the next call tells all of them."""
    training = trained.ddp()
    clipper = distclip.Clipper(training.parts, POLICY)
    training.backward(0)
    clipper.clip_()
    state = clipper.state_dict()
    if dist.get_rank() == 1:
        state["policy"]["mean"][[0, 1]] = state["policy"]["mean"][[1, 0]]
    clipper.load_state_dict(state)
    try:
        clipper.clip_()
    except distclip.LayoutError as error:
        return str(error)
    return ""


def test_ranks_that_load_other_means_are_told():
    for said in run_ranks(loaded_apart, 2):
        assert "after loading a state" in said


def on_device(folds: bool) -> tuple[list[float], list[bool], list[int], float]:
    """Steps whose gradients a fused AdamW would scale itself, one of them with an inf; and how far from a loop."""
    coefs, skips, waited, means = [], [], [], [0.0] * 4
    with on_the_accelerator():
        model, beside = layers(), layers()
        optimizer, other = (
            adamw(m) if folds else torch.optim.RMSprop(m.parameters(), foreach=False) for m in (model, beside)
        )
        clipper = distclip.Clipper(model, POLICY)
        for step in range(STEPS):
            scale = trained.SCALES[step % len(trained.SCALES)]
            fill(model, step, scale)
            fill(beside, step, scale)
            if step == 4:  # no call that compares copies
                raw(model[2].grad)[0, 0] = inf
            with counted_waits() as waits:
                report = clipper.step(optimizer)
            coefs.append(raw(report.coef).item())
            skips.append(raw(report.skip).item())
            waited += waits
            for k, p in enumerate(beside if step != 4 else ()):
                norm = raw(p.grad).double().norm().item()
                bound = POLICY.times * means[k] if means[k] else inf
                raw(p.grad).mul_(min(1.0, bound / (norm + 1e-6)))
                means[k] = POLICY.beta * means[k] + (1 - POLICY.beta) * min(norm, bound) if means[k] else norm
            if step == 4:
                # The policy saw that step too: every mean but that of the inf, which went on from its bound.
                norms = [raw(p.grad).double().norm().item() for p in beside]
                norms[2] = inf
                clipped = [min(n, POLICY.times * m) for n, m in zip(norms, means, strict=True)]
                means = [POLICY.beta * m + (1 - POLICY.beta) * c for m, c in zip(means, clipped, strict=True)]
            else:
                other.step()
        apart = max((raw(p.detach()) - raw(q.detach())).abs().max().item() for p, q in zip(model, beside, strict=True))
    return coefs, skips, waited, apart


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
@pytest.mark.parametrize("folds", [True, False], ids=["fused", "not fused"])
def test_on_an_accelerator_gradients_are_scaled_before_an_optimizer_that_could_fold(folds):
    """It is handed no coefficient, and skips by found_inf: no wait. One that cannot waits to know whether to skip."""
    (found,) = run_ranks(on_device, 1, folds, fresh=True)
    coefs, skips, waits, apart = found
    assert skips == [step == 4 for step in range(STEPS)]
    assert coefs[0] == coefs[4] == 1.0
    assert min(coefs) < 0.5
    assert apart < 1e-6
    if folds:  # after the inf the next call asks which parameter it was
        assert [w > 0 for w in waits] == [step == 5 for step in range(STEPS)]
    else:
        assert [w > 1 for w in waits] == [step == 4 for step in range(STEPS)]
