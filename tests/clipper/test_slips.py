"""Slips of the pen get an answer with the line to write, and a call that was broken off says how to go on."""

import inspect
import json
from collections.abc import Callable
from math import nan

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from support.ranks import run_ranks


def model() -> nn.Module:
    net = nn.Linear(3, 2)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    return net


@pytest.mark.parametrize(
    ("make", "error", "line"),
    [
        (lambda m, o: distclip.Clipper(m, max_norm=1.0), TypeError, "write Clipper(model, 1.0)"),
        (lambda m, o: distclip.Clipper(m, clip_value=0.5), TypeError, "write Clipper(model, ValueClip(0.5))"),
        (lambda m, o: distclip.attach(o, m, max_norm=2), TypeError, "write attach(optimizer, model, 2)"),
        (
            lambda m, o: distclip.Clipper(m.parameters(), 1.0),
            ValueError,
            "write Clipper(model, 1.0), or Clipper(torch.nn",
        ),
        (lambda m, o: distclip.Clipper(m.named_parameters(), 1.0), ValueError, "write Clipper(model, 1.0), or"),
        (lambda m, o: distclip.Clipper(m.weight, 1.0), ValueError, "write Clipper(model, 1.0), or Clipper"),
        (lambda m, o: distclip.Clipper(o, 1.0), ValueError, "call clipper.step(optimizer), or attach(optimizer, model"),
        (
            lambda m, o: distclip.Clipper(None, 1.0),
            ValueError,
            "a module or a list of modules, got NoneType",
        ),
        (lambda m, o: distclip.Clipper(m, "1.0"), ValueError, "policy must be a number"),
        (lambda m, o: distclip.Clipper(m, torch.ones(2)), ValueError, "policy must be a number"),
        (lambda m, o: distclip.Clipper(m, torch.tensor(True)), ValueError, "policy must be a number"),
        (lambda m, o: distclip.Clipper(m, torch.tensor(1j)), ValueError, "policy must be a number"),
        (lambda m, o: distclip.Clipper(m, torch.tensor(-1.0)), ValueError, "max_norm must be above 0"),
    ],
)
def test_a_slip_in_making_a_clipper_is_answered_with_the_line_to_write(make, error, line):
    net = model()
    with pytest.raises(error) as caught:
        make(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert line in str(caught.value)


@pytest.mark.parametrize("bound", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(1)])
def test_a_number_in_a_tensor_is_a_number(bound):
    clipper = distclip.Clipper(model(), bound)
    assert clipper.policy == distclip.MaxNorm(bound.item())
    assert clipper.clip_().max_norm.item() == bound.item()


def test_the_signature_of_a_clipper_is_still_seen():
    assert list(inspect.signature(distclip.Clipper).parameters)[:2] == ["model", "policy"]


def test_a_policy_is_read_and_not_set():
    clipper = distclip.Clipper(model(), 1.0)
    assert clipper.policy == distclip.MaxNorm(1.0)
    assert clipper.max_norm == 1.0
    assert not hasattr(distclip.Clipper(model(), distclip.ValueClip(1.0)), "max_norm")
    for name in ("policy", "max_norm"):
        with pytest.raises(AttributeError, match="build another for another bound"):
            setattr(clipper, name, 0.5)
    assert clipper.clip_().max_norm.item() == 1.0


def test_a_clipper_says_what_it_is():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    clipper = distclip.Clipper(net, distclip.AutoClip())
    clipper.step(optimizer)
    assert repr(clipper) == (
        "Clipper(AutoClip(percentile=10, window=1000, max_norm=inf), norm_type=2, 2 parameters, 1 rank, 1 steps)"
    )
    attached = distclip.attach(optimizer, net, 1.0)
    assert (
        repr(attached)
        == "Clipper(MaxNorm(max_norm=1.0), norm_type=2, 2 parameters, 1 rank, 0 steps, called by optimizer.step())"
    )


def test_numbers_of_a_report_that_json_has_not_are_documented():
    net = model()
    net.weight.grad[0, 0] = nan
    numbers = distclip.Clipper(net, 1.0).clip_().to_dict()
    with pytest.raises(ValueError, match="Out of range float"):
        json.dumps(numbers, allow_nan=False)
    assert "allow_nan" in inspect.getdoc(distclip.Report.to_dict)


# ---- broken off --------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """What a signal handler raises."""


BROKEN = (KeyboardInterrupt, OSError, torch.OutOfMemoryError, AssertionError)


class Breaking(torch.optim.SGD):
    """An optimizer whose step raises, once."""

    broken: type[BaseException] | None = None

    def step(self, closure=None):
        if self.broken:
            kind, self.broken = self.broken, None
            raise kind
        return super().step(closure)


class Interrupted:
    """The policy of ``MaxNorm(1.0)``; a signal handler interrupts it once, after the ranks have met."""

    kind: type[BaseException] | None = None

    def needs(self):
        return ()

    def init(self, units, device):
        return {}

    def decide(self, statistics, state):
        if self.kind:
            kind, self.kind = self.kind, None
            raise kind
        return distclip.Decision(1.0), state


def outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except (distclip.LayoutError, Stopped, *BROKEN) as error:
        return f"{type(error).__name__}: {error}"
    return "right"


def broken_off_on(ranks: list[int], where: str, road: str, kind: type[BaseException] = Stopped) -> list[str]:
    torch.manual_seed(0)
    net = model()
    optimizer = Breaking(net.parameters(), lr=0.1)
    policy = Interrupted()
    clipper = distclip.attach(optimizer, net, policy) if road == "attach" else distclip.Clipper(net, policy)

    def step() -> None:
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        if road == "attach":
            optimizer.step()
        elif road == "clip_":
            clipper.clip_()
        else:
            clipper.step(optimizer)

    said = [outcome(step)]
    state, weights = clipper.state_dict(), {k: v.clone() for k, v in net.state_dict().items()}
    if dist.get_rank() in ranks:
        if where == "in the policy":
            policy.kind = KeyboardInterrupt
        else:
            optimizer.broken = kind
    said += [outcome(step), outcome(step), outcome(clipper.measure)]
    net.load_state_dict(weights)
    clipper.load_state_dict(state)
    return [*said, outcome(step), outcome(clipper.measure)]


@pytest.mark.parametrize("ranks", [[1], [0, 1, 2]])
@pytest.mark.parametrize(
    ("where", "road"),
    [
        ("in the policy", "step"),
        ("in the policy", "clip_"),
        ("in the policy", "attach"),
        ("in the optimizer", "step"),
    ],
)
def test_a_step_that_a_signal_handler_broke_off_is_told_to_all_ranks_with_the_way_to_go_on(where, road, ranks):
    expect_all_told(run_ranks(broken_off_on, 3, ranks, where, road), ranks)


def expect_all_told(results: list[list[str]], ranks: list[int]) -> None:
    for rank, (first, broken, after, looked, again, at_last) in enumerate(results):
        assert first == again == at_last == "right"
        assert (broken == "right") == (rank not in ranks)
        for told in (after, looked):
            assert told.startswith("LayoutError: ")
            assert "was broken off by " in told
            if rank in ranks:
                assert "load one checkpoint on every rank" in told
            else:
                assert "rank 1: stopped: " in told


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("road", ["step", "attach"])
def test_an_exception_inside_the_optimizer_on_one_rank_is_told_to_all_so_that_replicas_do_not_drift(road, kind):
    expect_all_told(run_ranks(broken_off_on, 2, [1], "in the optimizer", road, kind), [1])


def raising_before_the_decision() -> list[str]:
    """A closure that raises on every rank, before the ranks have met."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    distclip.attach(optimizer, net, 1.0)

    def step(fails: bool) -> None:
        def closure() -> None:
            if fails:
                raise OSError
            for parameter in net.parameters():
                parameter.grad = torch.ones_like(parameter)

        optimizer.step(closure)

    return [outcome(lambda fails=fails: step(fails)) for fails in (True, False)]


def test_a_closure_that_raises_before_the_decision_breaks_no_step_off():
    assert run_ranks(raising_before_the_decision, 2) == [["OSError: ", "right"]] * 2


def alarmed() -> list[str]:
    """A handler raises TimeoutError on one rank once the ranks have met."""
    net = model()
    policy = Interrupted()
    clipper = distclip.Clipper(net, policy)
    if dist.get_rank():
        policy.kind = TimeoutError
    return [outcome(clipper.clip_), outcome(clipper.clip_)]


def test_a_timeout_error_of_an_alarm_is_no_error_of_the_call():
    (_, told), (_, own) = run_ranks(alarmed, 2)
    assert "rank 1: stopped: an earlier call was broken off by TimeoutError" in told
    assert "load one checkpoint on every rank" in own


def test_one_process_goes_on_after_a_step_that_was_broken_off():
    net = model()
    optimizer = Breaking(net.parameters(), lr=0.1)
    clipper = distclip.Clipper(net, 1.0)
    optimizer.broken = Stopped
    with pytest.raises(Stopped):
        clipper.step(optimizer)
    assert outcome(lambda: clipper.step(optimizer)) == "right"


@pytest.mark.parametrize("given", [{}, {"model": {}}])
def test_a_state_that_is_none_is_quoted_as_it_was_given(given):
    clipper = distclip.Clipper(model(), 1.0)
    with pytest.raises(ValueError, match=r"a Clipper's state has the keys \[.*\], got ") as error:
        clipper.load_state_dict(given)
    assert str(error.value).endswith(f", got {list(given)}")
