"""Ranks decide alike, or all of them raise: nobody hangs and nobody steps alone."""

import re
import time
from datetime import timedelta
from functools import partial
from math import inf, nan
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

import distclip
from distclip.plan.measure import REALIGNED, TAG_STEP
from distclip.plan.verify import VERIFYING
from distclip.ranks import slow_collective
from distclip.ranks.message import CODES, agreement_word
from distclip.ranks.slow_collective import SlowCollective
from distclip.step.calls import COMPARING, MEASURING, STRIDE, Calls
from support.layouts import DenseNet, backward, build, ddp, fsdp2
from support.ranks import run_ranks, same_bits

ERRORS = (distclip.LayoutError, distclip.NonFiniteError, ValueError)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def corrupt_replica(layout, bad: float, norm_type: float, nonfinite: str) -> dict[str, object]:
    model = layout()
    optimizer = AdamW(model.parameters(), lr=0.1, fused=True)
    clipper = distclip.Clipper(model, 1.0, norm_type=norm_type, nonfinite=nonfinite)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    if dist.get_rank() == 1:
        weight = next(p for n, p in model.named_parameters() if n.endswith("blocks.0.1.weight"))
        local(weight.grad)[1, 0] = bad
    try:
        report = clipper.step(optimizer)
        said = str(report.culprit)
        skip = report.skip.item()
    except distclip.NonFiniteError as error:
        said, skip = str(error), None
    after = [p.detach().clone() for p in model.parameters()]
    untouched = all(torch.equal(local(a), local(b)) for a, b in zip(before, after, strict=True))
    return {"said": said, "skip": skip, "untouched": untouched}


@pytest.mark.parametrize("layout", [ddp, fsdp2])
@pytest.mark.parametrize(("bad", "kind"), [(nan, "NaN"), (inf, "inf")])
@pytest.mark.parametrize("norm_type", [2.0, inf])
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_bad_number_on_one_rank_is_the_same_decision_on_all(layout, bad, kind, norm_type, nonfinite):
    results = run_ranks(corrupt_replica, 3, layout, bad, norm_type, nonfinite)
    assert all(r == results[0] for r in results)
    own, reduced = f"on rank 1 has {kind} in its gradient", f"has {kind} in its reduced gradient, held by rank 1; "
    assert f"blocks.0.1.weight {own if layout is ddp else reduced}" in results[0]["said"]
    assert results[0]["skip"] is (True if nonfinite == "skip" else None)
    assert results[0]["untouched"]


def calls(layout, norm_type: float, odd_rank: str) -> str:
    """Three steps; rank 1 does something else in the second."""
    model = layout()
    clipper = distclip.Clipper(model, 1.0, norm_type=norm_type)
    backward(model)
    try:
        for step in range(3):
            if step == 1 and dist.get_rank() == 1:
                if odd_rank == "an extra measurement":
                    clipper.measure()
                elif odd_rank == "a state of another step":
                    clipper.load_state_dict(clipper.state_dict() | {"steps": 7})
            clipper.clip_()
    except distclip.LayoutError as error:
        return str(error)
    return f"no error on rank {dist.get_rank()}"


@pytest.mark.parametrize("norm_type", [2.0, inf])
@pytest.mark.parametrize("odd_rank", ["an extra measurement", "a state of another step"])
def test_another_call_or_another_step_on_one_rank_is_an_error_on_all(norm_type, odd_rank):
    account = {
        "an extra measurement": "measure\\(\\) in step 1",
        "a state of another step": "step 7 after loading a state .*",
    }[odd_rank]
    for said in run_ranks(calls, 3, fsdp2, norm_type, odd_rank):
        assert "the ranks of the clipping group do not agree" in said
        assert re.search(rf"; rank 1: {account}, .*; rank 0: step 1, ", said)


def other_functions_parameters() -> str:
    model = build()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    backward(model)
    parameters = list(model.parameters())[1 if dist.get_rank() == 1 else 0 :]
    try:
        distclip.clip_grad_norm_(parameters, 1.0)
    except distclip.LayoutError as error:
        return str(error)
    return "no error"


def test_a_function_called_with_other_parameters_is_an_error_on_all_ranks():
    for said in run_ranks(other_functions_parameters, 3):
        assert "the ranks of the clipping group passed other parameters" in said


def lacking(layout, call: str, parameters: str) -> str:
    """Rank 1 lacks the gradients that ``parameters`` says."""
    model = layout()
    clipper = distclip.Clipper(model, 1.0)
    backward(model)
    if dist.get_rank() == 1:
        for name, p in model.named_parameters():
            p.grad = None if parameters in name else p.grad
    try:
        clipper.clip_() if call == "clip_" else distclip.clip_grad_norm_(model, 1.0, group=dist.group.WORLD)
    except distclip.LayoutError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("call", ["clip_", "function"])
@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ("head.weight", "head.weight;"),
        ("", "embed.weight, blocks.0.0.weight, blocks.0.0.bias, blocks.0.1.weight, blocks.0.1.bias and 10 more;"),
    ],
)
def test_a_gradient_that_one_replica_lacks_is_an_error_that_names_it(call, parameters, named):
    """It was counted as zeros: a wrong norm, and replicas that step apart."""
    for said in run_ranks(lacking, 3, ddp, call, parameters):
        assert re.search(rf"; rank 1: .*, without a gradient of {re.escape(named)} rank 0: ", said)


def test_a_shard_that_one_rank_lacks_counts_as_zeros():
    assert run_ranks(lacking, 2, fsdp2, "clip_", "head.weight") == ["no error"] * 2


def function_called_otherwise(setting: str, value: float) -> str:
    model = fsdp2()
    backward(model)
    settings = {"max_norm": 1.0, "norm_type": 2.0, "error_if_nonfinite": False}
    if dist.get_rank() == 2:
        settings[setting] = value
    try:
        distclip.clip_grad_norm_(model.parameters(), **settings)
    except distclip.LayoutError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(("setting", "value"), [("max_norm", 1.5), ("norm_type", 3.0), ("error_if_nonfinite", True)])
def test_a_function_called_with_other_settings_is_an_error_on_all_ranks(setting, value):
    """Each rank scaled its shards by a factor of its own."""
    for said in run_ranks(function_called_otherwise, 3, setting, value):
        assert re.search(rf"; rank 2: clip_grad_norm_\(.*{setting}={value}.*; rank 0: clip_grad_norm_\(", said)


def built_differently(what: str) -> str:
    odd = dist.get_rank() == 1
    model: nn.Module = DenseNet()
    settings: dict[str, object] = {"norm_type": 2.0, "nonfinite": "skip", "max_consecutive_skips": None}
    policy: object = 1.0
    if odd and what == "names":
        model = nn.ModuleDict({"other": model})
    elif odd and what == "shapes":
        model.head = nn.Linear(12, 3)
    elif odd and what == "dtypes":
        model.head.half()
    elif odd and what == "missing":
        del model.blocks[1]
    elif odd and what == "policy":
        policy = distclip.AutoClip()
    elif odd and what == "max_norm":
        policy = distclip.MaxNorm(2.0)
    elif odd and what in settings:
        settings[what] = {"norm_type": inf, "nonfinite": "raise", "max_consecutive_skips": 1}[what]
    try:
        distclip.Clipper(model, policy, **settings)
    except ERRORS as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("what", ["names", "shapes", "dtypes", "missing"])
def test_other_parameters_on_one_rank_are_refused_at_construction(what):
    for said in run_ranks(built_differently, 3, what):
        assert said.startswith("LayoutError: the ranks of the clipping group hold parameters of different names")


@pytest.mark.parametrize("what", ["policy", "max_norm", "norm_type", "nonfinite", "max_consecutive_skips"])
def test_other_settings_on_one_rank_are_refused_at_construction(what):
    named = "policy" if what == "max_norm" else what
    for said in run_ranks(built_differently, 3, what):
        expected = f"ValueError: {named} must be the same on every rank: build every Clipper alike; rank 1: {named} "
        assert said.startswith(expected)


def adaptive(size: int) -> tuple[list[float], dict[str, object]]:
    model = fsdp2() if dist.get_world_size() > 1 else build()
    clipper = distclip.Clipper(model, distclip.AutoClip(percentile=40, window=5))
    coefs = []
    for step in range(12):
        backward(model, step)
        coefs.append(clipper.clip_().coef.item())
        model.zero_grad()
    return coefs, clipper.state_dict()


def test_an_adaptive_policy_keeps_one_state_on_all_ranks():
    results = run_ranks(adaptive, 3, 3)
    assert same_bits(results)
    (alone,) = run_ranks(adaptive, 1, 1)
    assert len({round(c, 4) for c in alone[0]}) > 3
    assert results[0][0] == pytest.approx(alone[0], rel=1e-5)


def skewed_gradients(how: str) -> str:
    model = ddp() if how in ("no_sync", "one replica") else fsdp2()
    clipper = distclip.Clipper(model, 1.0)
    if how == "no_sync":
        with model.no_sync():
            backward(model)
    else:
        backward(model)
    if how == "one replica" and dist.get_rank() == 0:
        next(model.parameters()).grad[0, 0] += 1
    try:
        clipper.verify()
    except distclip.LayoutError as error:
        return str(error)
    return "no error"


def test_verify_finds_gradients_that_were_not_reduced():
    for said in run_ranks(skewed_gradients, 2, "no_sync"):
        assert "ranks that should hold the same gradient do not: embed.weight" in said
        assert "no_sync" in said
    for said in run_ranks(skewed_gradients, 2, "one replica"):
        assert "do not: embed.weight; " in said
    assert run_ranks(partial(skewed_gradients, "as it should be"), 2) == ["no error"] * 2


def absent(kind: str) -> str:
    """Rank 1 does not come to the norm: it raised before, or comes when the others have given up."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    model = build()
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 1:
        if kind == "late":
            store.wait(["given up by 0", "given up by 2"])
        return "did not come"
    try:
        distclip.clip_grad_norm_(model, 1.0, group=group)
    except RuntimeError as error:
        store.set(f"given up by {dist.get_rank()}", "")
        return str(error)
    return "no error"


@pytest.mark.parametrize("kind", ["raised before", "late"])
def test_who_did_not_come_is_named(kind):
    said = run_ranks(absent, 3, kind, fresh=True)
    assert said[1] == "did not come"
    for message in (said[0], said[2]):
        assert "rank 1 did not join or died" in message


class Slow:
    """A collective that is done just after somebody gave up looking, or has failed by then."""

    def __init__(self, error: str) -> None:
        self.looks, self.error = 0, error

    def wait(self, limit: timedelta | None = None) -> None:
        self.looks += 1
        if self.looks == 1:
            raise RuntimeError("Operation timed out!")
        if self.error:
            raise RuntimeError(self.error)

    def is_completed(self) -> bool:
        return True


def test_a_collective_that_is_done_when_the_look_ends_is_done():
    done = Slow("")
    SlowCollective(range(2), "group", 2).wait(done)
    assert done.looks == 2
    with pytest.raises(RuntimeError, match="peer"):
        SlowCollective(range(2), "group", 2).wait(Slow("Connection closed by peer"))


def came_late() -> str:
    slow_collective.PATIENCE = 60.0  # a busy machine may start rank 1 later still
    group = dist.new_group(timeout=timedelta(seconds=2))
    model = build()
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    if dist.get_rank() == 1:
        time.sleep(3.5)
    try:
        distclip.clip_grad_norm_(model, 1.0, group=group)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_who_came_late_is_named():
    for message in run_ranks(came_late, 3, fresh=True):
        assert re.search(r"rank 1 joined late, \d+\.\d s after the others", message)


# ---- two Clippers --------------------------------------------------------------------------------------------


def in_another_order(steps_before: int, call: str) -> list[str]:
    """Two FSDP2 models of equal shapes with a Clipper each; the last rank calls them the other way round."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    models = [nn.Linear(8, 8) for _ in range(2)]
    clippers = []
    for model in models:
        fully_shard(model, mesh=mesh)
        clippers.append(distclip.Clipper(model, 1.0))
        model(torch.ones(4, 8) * 3).square().sum().backward()
    for _ in range(steps_before):
        clippers[0].clip_()
    first = dist.get_rank() == dist.get_world_size() - 1
    said = []
    for index in (first, not first, 0, 1):
        clipper = clippers[index]
        calls = {"clip_": clipper.clip_, "measure": clipper.measure, "verify": clipper.verify}
        try:
            said.append(str(calls[call]()))
        except distclip.LayoutError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize(("size", "steps_before"), [(2, 0), (2, 3), (4, 0)])
@pytest.mark.parametrize("call", ["clip_", "measure", "verify"])
def test_clippers_of_equal_models_called_in_another_order_are_an_error_on_all_ranks(call, size, steps_before):
    for first, second, *alike in run_ranks(in_another_order, size, steps_before, call):
        for said in (first, second):
            assert " do not agree: " in said
            assert re.search(r"; rank \d: [^;]* of Clipper [12]\b.*; rank \d: [^;]* of Clipper [12]\b", said)
        assert not any("do not agree" in said for said in alike)


KINDS = [0, COMPARING, REALIGNED, REALIGNED + COMPARING, MEASURING, MEASURING + REALIGNED]
KINDS += [VERIFYING, VERIFYING + REALIGNED]


def least_gap(number: int) -> int:
    """In how many steps from each other two Clippers, ``number`` apart, can first share a tag."""
    gaps = [(STRIDE * number + a - b) % CODES for a in KINDS for b in KINDS]
    return min(min(gap, CODES - gap) for gap in gaps)


def test_no_two_calls_of_a_groups_clippers_have_the_same_tag_within_the_limit_that_calls_tells():
    closest = CODES
    for number in range(1, 1000):  # number + 1 Clippers
        closest = min(closest, least_gap(number))
        assert closest >= 2**28 / (3 * (number + 1))
    kinds_apart = [(a - b) % CODES for a in KINDS for b in KINDS if a != b]
    assert min(min(gap, CODES - gap) for gap in kinds_apart) >= 2**28  # one Clipper's calls of two kinds


def test_beyond_that_limit_clippers_can_have_the_same_tag():
    far = Calls(inf, steps=STRIDE)
    assert far.step(captured=False).tag == Calls(inf, number=1).step(captured=False).tag


@pytest.mark.parametrize("steps_apart", [(0, 1, -1), (1, 0, -1), (1, -1, 0, 0), (0, 1, -1, 2, -2), (3, 1, 2, 0, 4)])
def test_ranks_ahead_and_ranks_as_far_behind_have_words_that_do_not_cancel(steps_apart):
    """Summed as they are, 24 % of all codes would cancel for one step and 80 % for fifty, with 16 bits."""
    unseen, size = 0, len(steps_apart)
    for code in range(0, CODES, CODES // 1000):
        for step in (1, 2, 3, 7, 50):
            codes = [(code + TAG_STEP * step * apart) % CODES for apart in steps_apart]
            unseen += sum(agreement_word(codes[rank], rank, size) for rank in range(size)) == 0
    assert unseen == 0


def test_words_of_the_most_ranks_are_added_exactly():
    size, largest = 2**20, 0
    for code in (1, CODES // 2, CODES - 1):
        words = [agreement_word(code, rank, size) for rank in (0, 1)]
        assert words[0] + (size - 1) * words[1] == 0
        largest = max(largest, -words[0])
    assert largest < CODES * size == 2**52
    assert agreement_word(0, 0, size) == agreement_word(0, 1, size) == 0


def built_by_some() -> list[int]:
    """Numbers of Clippers of the default group, of which one rank has built another one alone meanwhile."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    model = nn.Linear(2, 2)
    numbers = [distclip.Clipper(model, 1.0).engine.progress.calls.number]
    if dist.get_rank() == 0:
        distclip.Clipper(model, 1.0, group=alone)
    return [*numbers, distclip.Clipper(model, 1.0).engine.progress.calls.number]


def test_clippers_are_counted_by_group():
    assert run_ranks(built_by_some, 2) == [[0, 1]] * 2


def by_functions_in_another_order(named: bool) -> list[str]:
    """The same by the functions, whose two models have other names only where they are given some."""
    mesh, said = init_device_mesh("cpu", (dist.get_world_size(),)), []
    models = [fully_shard(nn.Linear(8, 8), mesh=mesh) for _ in range(2)]
    for scale, model in enumerate(models, 1):
        model(torch.ones(4, 8) * scale).square().sum().backward()
    for index in (0, 1) if dist.get_rank() == 0 else (1, 0):
        model = nn.ModuleDict({f"critic_{index}": models[index]}) if named else models[index]
        try:
            said.append(f"{distclip.clip_grad_norm_(model, 1e9):.4g}")
        except distclip.LayoutError as error:
            said.append(str(error))
    return said


def test_functions_of_equal_models_called_in_another_order_are_told_apart_by_names_alone():
    """The limit that their docstring tells."""
    for said in run_ranks(by_functions_in_another_order, 2, True):
        assert all(text.startswith("the ranks of the clipping group passed other parameters") for text in said)
    assert not any("ranks" in text for said in run_ranks(by_functions_in_another_order, 2, False) for text in said)


class OfItsRank:
    """A policy that is not the same function on every rank."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def needs(self) -> tuple[()]:
        return ()

    def init(self, units: distclip.Units, device: torch.device) -> distclip.policies.State:
        return {}

    def decide(self, statistics: distclip.Statistics, state: distclip.policies.State) -> tuple[distclip.Decision, Any]:
        mine = dist.get_rank() == 1
        decisions = {
            "bound": distclip.Decision(0.5 if mine else 0.25),
            "coef": distclip.Decision(1.0, coef=0.5 if mine else 0.25),
            "skip": distclip.Decision(1.0, skip=mine),
            "bounds": distclip.Decision(inf, bounds=(-1.0, 0.5 if mine else 0.25)),
            "alike": distclip.Decision(0.5 * (1 + mine * 1e-12)),
        }
        return decisions[self.answer], state


def steps_with(answer: str, attached: bool) -> list[str]:
    model = ddp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = OfItsRank(answer)
    make = distclip.attach if attached else lambda _, *arguments: distclip.Clipper(*arguments)
    clipper, said = make(optimizer, model, policy), []
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        try:
            optimizer.step() if attached else clipper.step(optimizer)
            said.append("made")
        except distclip.LayoutError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("answer", ["bound", "coef", "skip", "bounds", "alike"])
def test_a_policy_that_decides_otherwise_on_one_rank_is_an_error_in_the_next_call(answer, size, attached):
    for first, *others in run_ranks(steps_with, size, answer, attached):
        assert first == "made"
        if answer == "alike":
            assert others == ["made", "made"]
        else:
            assert all("has a policy that decided otherwise in the step before" in said for said in others)
