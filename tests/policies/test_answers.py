"""What a policy may answer: everything else is refused before anything changes, on all ranks alike."""

from dataclasses import dataclass, field
from fractions import Fraction
from math import inf, isnan, nan
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import distclip
from distclip import AutoClip, Clipper, Decision, LayoutError
from support.ranks import run_ranks, same_bits


def f64(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@dataclass
class Answers:
    """A policy that returns what it is told, its state unchanged where nothing is said of it."""

    decision: Any
    state: Any = None
    start: dict[str, torch.Tensor] = field(default_factory=lambda: {"n": f64(0.0)})

    def needs(self):
        return ()

    def init(self, units, device):
        return self.start

    def decide(self, statistics, state):
        return self.decision, state if self.state is None else self.state


def five() -> torch.nn.Linear:
    """A gradient of norm 5."""
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    return model


class Larger(Decision):
    """A subclass of a user's own."""


NUMBERS = {
    "a bound of -1": (Decision(f64(-1.0)), "max_norm = -1.0"),
    "a bound of NaN": (Decision(f64(nan)), "max_norm = nan"),
    "a bound of NaN, skip: False": (Decision(f64(nan), skip=torch.tensor(False)), "max_norm = nan"),
    "a bound of 0": (Decision(0), "max_norm = 0.0"),
    "minus inf": (Decision(-inf), "max_norm = -inf"),
    "a coefficient of 0": (Decision(1.0, coef=f64(0.0)), "coef = 0.0"),
    "a coefficient of inf": (Decision(1.0, coef=inf), "coef = inf"),
    "a coefficient of NaN": (Decision(1.0, coef=nan), "coef = nan"),
    "bounds the wrong way round": (Decision(inf, bounds=(1.0, -1.0)), r"bounds = \(1.0, -1.0\)"),
    "bounds on one side of 0": (Decision(inf, bounds=(5.0, 6.0)), r"bounds = \(5.0, 6.0\)"),
    "bounds of NaN": (Decision(inf, bounds=(f64(nan), f64(nan))), r"bounds = \(nan, nan\)"),
    "bounds of 0": (Decision(inf, bounds=(0.0, 0.0)), r"bounds = \(0.0, 0.0\)"),
}
KINDS = {
    "no bound": (Decision(None), "max_norm = None"),
    "a text": (Decision("1.0"), "max_norm = '1.0'"),
    "a bool": (Decision(True), "max_norm = True"),
    "a bool tensor": (Decision(torch.tensor(True)), "max_norm = a .*ens.* of shape"),
    "a complex number": (Decision(torch.tensor(1j)), "max_norm = a .*ens.* of shape"),
    "two bounds": (Decision(torch.ones(2)), "max_norm = a .*ens.* of shape"),
    "a bound on meta": (Decision(torch.ones((), device="meta")), "max_norm = a .*ens.* of shape"),
    "a list to skip": (Decision(1.0, skip=[False]), r"skip = \[False\]"),
    "three element bounds": (Decision(inf, bounds=(-1.0, 0.0, 1.0)), "bounds = "),
    "one element bound": (Decision(inf, bounds=1.0), "bounds = 1.0"),
    "nothing": (None, r"\['NoneType', 'dict'\], .*: return a Decision"),
    "a number": (1.0, r"\['float', 'dict'\], .*: return a Decision"),
}
STATES = {
    "another shape": ({"n": torch.zeros(3, dtype=torch.float64)}, r"state n as a dense tensor of shape \(3,\)"),
    "an expanded one": ({"n": f64(0.0).expand(2)}, r"state n as a dense tensor of shape \(2,\)"),
    "another dtype": ({"n": torch.tensor(7)}, "dtype torch.int64"),
    "another key": ({"m": f64(0.0)}, r"the keys \['m'\]"),
    "a key missing": ({}, r"the keys \[\]"),
    "a key too many": ({"n": f64(0.0), "m": f64(0.0)}, r"the keys \['m', 'n'\]"),
    "a number": ({"n": 1.0}, "state n as 1.0"),
    "on meta": ({"n": torch.zeros((), dtype=torch.float64, device="meta")}, "that is not dense"),
    "sparse": ({"n": f64(0.0).to_sparse()}, "that is not dense"),
    "no dictionary": ([f64(0.0)], "a state with a list for it"),
}
REFUSED = {
    **{f"number: {name}": (Answers(decision), says) for name, (decision, says) in {**NUMBERS, **KINDS}.items()},
    **{f"state: {name}": (Answers(Decision(1.0), state), says) for name, (state, says) in STATES.items()},
}
CALLS = {
    "measure": lambda clipper, optimizer: clipper.measure(),
    "clip_": lambda clipper, optimizer: clipper.clip_(),
    "step": lambda clipper, optimizer: clipper.step(optimizer),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_answer_is_refused_by_name_and_changes_nothing(name):
    policy, says = REFUSED[name]
    for nonfinite in ("skip", "propagate", "raise"):
        for call in CALLS.values():
            model = five()
            weight = model.weight.detach().clone()
            clipper = Clipper(model, policy, nonfinite=nonfinite)
            before = clipper.state_dict()
            with pytest.raises(ValueError, match=rf"Answers\.decide returned .*{says}"):
                call(clipper, torch.optim.SGD(model.parameters(), 0.1, fused=True))
            assert model.weight.grad.tolist() == [[3.0, 4.0]]
            assert torch.equal(model.weight, weight)
            assert same_bits([before, clipper.state_dict()])
            assert clipper.report is None


GOOD = {
    "float": Decision(1.0),
    "int": Decision(1),
    "fraction": Decision(Fraction(1)),
    "float32 of numpy": Decision(np.float32(1)),
    "float64 of numpy": Decision(np.float64(1)),
    "array of numpy": Decision(np.array(1)),
    "float16": Decision(torch.ones((), dtype=torch.float16)),
    "int64": Decision(torch.ones((), dtype=torch.int64)),
    "one element": Decision(torch.ones(1, 1)),
    "expanded": Decision(torch.ones(()).expand(1)),
    "requires grad": Decision(torch.nn.Parameter(torch.ones(()))),
    "subclass": Larger(1.0),
    "not skipped": Decision(1.0, skip=False),
    "not skipped, numpy": Decision(1.0, skip=np.bool_(False)),
    "not skipped, tensor": Decision(1.0, skip=torch.zeros(1)),
    "coefficient": Decision(inf, coef=torch.tensor(0.2, requires_grad=True)),
    "bounds": Decision(1.0, bounds=(torch.tensor(-1, dtype=torch.int8), 1)),
    "bounds of one side": Decision(1.0, bounds=[0, inf]),
}


@pytest.mark.parametrize("name", GOOD)
def test_any_real_number_is_taken(clipper_of, name):
    model = five()
    clipper = clipper_of(model, Answers(GOOD[name]))
    for _ in range(2):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        report = clipper.clip_()
        assert model.weight.grad.tolist() == [pytest.approx([0.6, 0.8], rel=1e-6)]
        assert (report.coef.shape, report.coef.dtype) == ((), torch.float32)
        assert (report.max_norm.shape, report.max_norm.requires_grad) == ((), False)
        assert not report.skip


@pytest.mark.parametrize("skip", [True, np.bool_(True), 1, torch.tensor([True]), torch.ones((), dtype=torch.int64)])
def test_a_skip_may_be_a_bool_or_a_tensor_and_leaves_the_numbers_unread(clipper_of, skip):
    model = five()
    clipper = clipper_of(model, Answers(Decision(f64(nan), skip=skip, coef=f64(-1.0))))
    for _ in range(2):
        assert clipper.clip_().skip
        assert model.weight.grad.tolist() == [[3.0, 4.0]]


class Twice:
    """A bound, element bounds and a coefficient of NaN where the norm is NaN."""

    def needs(self):
        return ()

    def init(self, units, device):
        return {}

    def decide(self, statistics, state):
        norm = statistics.norm()
        return Decision(2 * norm, bounds=(-2 * norm, 2 * norm), coef=0.5 + 0 * norm), state


def test_a_bound_made_of_a_norm_that_is_not_finite_is_no_error(clipper_of):
    for nonfinite in ("skip", "propagate"):
        model = five()
        clipper = clipper_of(model, Twice(), nonfinite=nonfinite)
        for bad in (nan, inf):
            model.weight.grad = torch.tensor([[bad, 4.0]])
            report = clipper.clip_()
            assert report.skip.item() == (nonfinite == "skip")
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clipper.clip_().coef == 0.5
    clipper = clipper_of(model, Twice(), nonfinite="raise")
    model.weight.grad = torch.tensor([[nan, 4.0]])
    with pytest.raises(distclip.NonFiniteError):
        clipper.clip_()


class InPlace:
    """Changes whatever it is handed, and returns entries that lie in each other."""

    def __init__(self):
        self.own = {"a": f64(1.0), "b": f64(2.0)}

    def needs(self):
        return ()

    def init(self, units, device):
        return self.own

    def decide(self, statistics, state):
        statistics.norm().fill_(1000.0)
        state["a"].add_(1)
        state["b"].add_(1)
        state["c"] = state["a"]
        return Decision(f64(1.0)), {"a": state["b"], "b": state["a"]}


def test_a_policy_that_changes_what_it_is_handed_changes_nothing_by_measure(clipper_of):
    model = five()
    policy = InPlace()
    clipper = clipper_of(model, policy)
    for _ in range(2):
        assert clipper.measure().norm == 5
        assert clipper.state_dict()["policy"] == {"a": 1.0, "b": 2.0}
    assert clipper.clip_().norm == 5
    assert clipper.state_dict()["policy"] == {"a": 3.0, "b": 2.0}
    assert policy.own == {"a": 1.0, "b": 2.0}
    assert clipper_of(model, policy).state_dict()["policy"] == {"a": 1.0, "b": 2.0}


class Kept:
    """Answers with one tensor again and again, learned: it has a gradient function."""

    def __init__(self):
        self.bound = torch.nn.Parameter(f64(4.0))

    def needs(self):
        return ()

    def init(self, units, device):
        return {"seen": torch.zeros((), dtype=torch.float64, requires_grad=True)}

    def decide(self, statistics, state):
        with torch.no_grad():
            self.bound -= 1
        return Decision(self.bound * 1.0), {"seen": state["seen"] + self.bound * statistics.norm()}


def test_a_policy_that_learns_keeps_no_graph_alive():
    model = five()
    clipper = Clipper(model, Kept())
    reports = [clipper.clip_() for _ in range(2)]
    assert [report.max_norm.item() for report in reports] == [3.0, 2.0]
    assert not any(value.requires_grad for value in clipper.engine.progress.state.values())


@pytest.mark.parametrize(
    "start", [None, [f64(0.0)], {"n": 0.0}, {1: f64(0.0)}, {"n": f64(0.0).to_sparse()}, {"n": f64(0.0).to("meta")}]
)
def test_a_state_that_is_none_is_refused_when_the_clipper_is_made(start):
    with pytest.raises(ValueError, match=r"Answers\.init returned .*no Clipper was made: return a dictionary"):
        Clipper(five(), Answers(Decision(1.0), start=start))


def test_an_attached_optimizer_refuses_a_bad_answer_before_its_step_and_goes_on_after_it():
    model = five()
    policy = Answers(Decision(f64(-1.0)))
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0), torch.optim.RMSprop(model.parameters(), lr=1.0)]
    clipper = distclip.attach(optimizers[0], model, policy)
    before = model.weight.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"max_norm = -1\.0"):
            optimizers[0].step()
        assert torch.equal(model.weight, before)
        assert model.weight.grad.tolist() == [[3.0, 4.0]]
    policy.decision = Decision(1.0)
    optimizers[0].step()
    assert clipper.report.coef.item() == pytest.approx(0.2)
    assert not torch.equal(model.weight, before)


# ---- ranks --------------------------------------------------------------------------------------------------


def refused_on_ranks() -> tuple[list[str], list[float], dict[str, Any]]:
    """Every bad answer once, each followed by a good one, of one Clipper on each rank."""
    model, said, coefs = five(), [], []
    for policy, _ in REFUSED.values():
        clipper, good = Clipper(model, policy), Answers(Decision(1.0))
        for call in (clipper.measure, clipper.clip_):
            try:
                call()
            except ValueError as error:
                said.append(str(error))
        policy.decision, policy.state = good.decision, None
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        coefs.append(clipper.clip_().coef.item())
    return said, coefs, clipper.state_dict()


def test_every_rank_refuses_a_bad_answer_and_all_go_on_together():
    results = run_ranks(refused_on_ranks, 2)
    assert same_bits(results)
    said, coefs, _ = results[0]
    assert len(said) == 2 * len(REFUSED)
    assert coefs == [pytest.approx(0.2)] * len(REFUSED)


def sharded_answers() -> list[str]:
    """A bound and a state that are DTensors, which no rank may read alone."""
    mesh, said = init_device_mesh("cpu", (dist.get_world_size(),)), []
    whole = DTensor.from_local(f64(1.0), mesh, [Replicate()])
    for policy in (Answers(Decision(whole)), Answers(Decision(1.0), {"n": whole})):
        try:
            Clipper(five(), policy).clip_()
        except ValueError as error:
            said.append(str(error).partition(",")[0])
    return said


def test_a_dtensor_is_no_answer():
    for bound, state in run_ranks(sharded_answers, 2):
        assert bound.startswith("Answers.decide returned max_norm = a DTensor that is not dense")
        assert state.startswith("Answers.decide returned state n as a DTensor that is not dense")


class Fails:
    """Raises, or answers badly, on the last rank in its second call."""

    def __init__(self, how: str):
        self.how, self.calls = how, 0

    def needs(self):
        return ()

    def init(self, units, device):
        return {"calls": f64(0.0)}

    def decide(self, statistics, state):
        self.calls += 1
        if self.calls == 2 and dist.get_rank() == dist.get_world_size() - 1:
            if self.how == "raises":
                raise KeyError("of its own")
            return Decision(f64(-1.0)), state
        return Decision(f64(1.0)), {"calls": state["calls"] + 1}


def one_sided(how: str, attached: bool) -> tuple[list[str], list[float], Any]:
    model = five()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if attached:
        clipper, call = distclip.attach(optimizer, model, Fails(how)), optimizer.step
    else:
        clipper = Clipper(model, Fails(how))
        call = lambda: clipper.step(optimizer)  # noqa: E731
    said, seen = [], []
    for _ in range(3):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        try:
            call()
            said.append("")
        except (KeyError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
        seen.append(model.weight.grad.flatten()[0].item())
    return said, seen, clipper.state_dict()


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("how", ["raises", "answers badly"])
def test_a_policy_that_fails_on_one_rank_leaves_no_rank_waiting_and_no_clipper_half_advanced(how, attached):
    (said, seen, state), (theirs, at_last, stopped) = run_ranks(one_sided, 2, how, attached)
    expected = "KeyError: 'of its own'" if how == "raises" else "ValueError: Fails.decide returned max_norm = -1.0"
    assert said[:2] == ["", ""]
    assert theirs[1].startswith(expected)
    for third in (said[2], theirs[2]):
        assert third.startswith("LayoutError: the ranks of the clipping group do not agree")
        assert "rank 0: step 2" in third
        assert "rank 1: step 1" in third
    assert seen == pytest.approx([0.6, 0.6, 3.0])
    assert at_last == pytest.approx([0.6, 3.0, 3.0])
    assert (state["steps"], state["policy"]["calls"]) == (2, 2)
    assert (stopped["steps"], stopped["policy"]["calls"]) == (1, 1)


def bad_state_on_one_rank() -> str:
    start = {"n": f64(0.0)} if dist.get_rank() else None
    try:
        Clipper(five(), Answers(Decision(1.0), start=start))
    except (LayoutError, ValueError) as error:
        return str(error)
    return ""


def test_an_init_that_fails_on_one_rank_is_told_to_all():
    here, there = run_ranks(bad_state_on_one_rank, 2)
    assert here.startswith("Answers.init returned None")
    assert "rank 0: stopped: Answers.init returned None" in there


def test_a_policy_of_ones_own_may_wrap_another():
    """As the policies to come do: half of what AutoClip allows."""

    class Half(Answers):
        def init(self, units, device):
            return AutoClip(100).init(units, device)

        def decide(self, statistics, state):
            decision, state = AutoClip(100).decide(statistics, state)
            return Decision(decision.max_norm / 2, coef=decision.coef / 2), state

    model = five()
    report = Clipper(model, Half(None)).clip_()
    assert (report.max_norm, report.coef) == (2.5, 0.5)
    assert not isnan(model.weight.grad.sum())
