"""A policy whose answer is bad for one unit of many: the promised error, and nothing has changed.

On the host at once; on an accelerator, where that would be a host sync, in the next call, and the step was skipped.
"""

from math import inf, isnan, nan
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip import Decision, Statistic
from promises.test_accelerator import EXISTS, adamw, fill, layers, on_the_accelerator
from support.accelerator import no_waits, raw
from support.layouts import ddp
from support.oracle import same_tensors
from support.ranks import run_ranks, same_bits

OVER = Statistic("group", groups={"a": ("0", "1"), "b": ("1", "2")})
APART = Statistic("group", groups={"a": "0", "b": ("2", "3")})
LEVELS = (Statistic("parameter"), Statistic("row"), OVER, APART, Statistic("parameter", of="parameter"))
ROWS = 7 + 1 + 2 + 40
BAD: dict[str, tuple[dict[str, Any], str]] = {  # the answer, and how the error begins on the host; lists are tensors
    "bound of NaN": ({"max_norm": [1, nan, 1, 1]}, "max_norm = nan for 1 (unit 1 of 4)"),
    "bound of 0": ({"max_norm": [1, 1, 0, 1]}, "max_norm = 0.0 for 2 (unit 2 of 4)"),
    "bound below 0": ({"max_norm": [1, 1, 1, -2]}, "max_norm = -2.0 for 3 (unit 3 of 4)"),
    "coefficient of inf": ({"coef": [inf, 1, 1, 1]}, "coef = inf for 0 (unit 0 of 4)"),
    "coefficient of 0": ({"coef": [1, 1, 1, 0]}, "coef = 0.0 for 3 (unit 3 of 4)"),
    "bound of a group": ({"max_norm": [1, nan], "per": APART}, "max_norm = nan for b (unit 1 of 2)"),
    "bound of the last row": (
        {"max_norm": [*[1] * (ROWS - 1), -inf], "per": "row"},
        f"max_norm = -inf for 3[39] (unit {ROWS - 1} of {ROWS})",
    ),
}
KNOWN: dict[str, tuple[dict[str, Any], str]] = {  # without reading a number
    "too many": ({"max_norm": [1] * 5}, "max_norm = a dense tensor of shape (5,)"),
    "too few coefficients": ({"coef": [1] * 3}, "coef = a dense tensor of shape (3,)"),
    "bools": ({"max_norm": torch.ones(4, dtype=torch.bool)}, "max_norm = a dense tensor of shape (4,) and dtype"),
    "complex": ({"coef": torch.ones(4, dtype=torch.complex64)}, "coef = a dense tensor of shape (4,) and dtype"),
    "sparse": ({"max_norm": torch.ones(4).to_sparse()}, "max_norm = a Tensor that is not dense"),
    "no level": ({"per": "layer"}, "per = 'layer'"),
    "groups that overlap": ({"per": OVER}, "per = "),
    "of parameters": ({"per": Statistic("parameter", of="parameter")}, "per = "),
    "other groups": ({"per": Statistic("group", groups={"a": "1"})}, "per = "),
    "bounds of units": ({"bounds": ([0] * 4, [1] * 4)}, "bounds = a dense tensor of shape (4,)"),
    "bounds above 0": ({"max_norm": [1] * 4, "bounds": (0.5, 1.0)}, "bounds = (0.5, 1.0)"),
}


class Answers:
    """A policy of many levels whose answer a test changes."""

    def __init__(self, answer: dict[str, Any] | None = None) -> None:
        self.answer = {"max_norm": [1.0, inf, 0.5, 0.25]} if answer is None else answer

    def needs(self):
        return LEVELS

    def init(self, units, device):
        return {"decided": torch.zeros(units.shape("parameter"), dtype=torch.float64, device=device)}

    def decide(self, statistics, state):
        def here(value):
            tensor = torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else None
            return value if tensor is None else tensor.to(statistics.norm().device, non_blocking=True)

        answer = {n: tuple(map(here, v)) if n == "bounds" else here(v) for n, v in self.answer.items()}
        return Decision(**{"max_norm": 1.0, "per": "parameter", **answer}), {"decided": state["decided"] + 1}


def told_by(call: Any) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def kept(model: nn.Module, clipper: distclip.Clipper) -> list[Any]:
    """All that a call may change."""
    tensors = [raw(t).clone() for p in model.parameters() for t in (p.detach(), p.grad)]
    state = clipper.state_dict()
    return [tensors, raw(state["policy"]["decided"]), state["steps"]]


def at_once(names: list[str], accelerator: bool) -> dict[str, tuple[str, bool, float]]:
    """What each bad answer says, whether all is as it was, and the coefficient of a good one after that."""
    found = {}
    for name in names:
        torch.manual_seed(0)
        model = layers() if accelerator else nn.ParameterList(map(nn.Parameter, shapes()))
        policy = Answers()
        clipper, optimizer = distclip.Clipper(model, policy), torch.optim.SGD(model.parameters(), lr=0.1)
        good = policy.answer
        for _ in range(2):
            set_gradients(model)
            clipper.clip_()
        set_gradients(model)
        before, policy.answer = kept(model, clipper), (BAD | KNOWN)[name][0]
        said = {told_by(call) for call in (clipper.measure, clipper.clip_, lambda c=clipper, o=optimizer: c.step(o))}
        same, policy.answer = same_bits([before, kept(model, clipper)]), good
        found[name] = (said, same, clipper.step(optimizer).coef.item())
    return found


def shapes() -> list[Tensor]:
    return [torch.randn(shape) for shape in ((7, 5), (3,), (2, 2), (40, 3))]


def set_gradients(model: nn.Module) -> None:
    for k, p in enumerate(model.parameters()):
        values = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
        p.grad = values.to(p.device)


@pytest.mark.parametrize("size", [1, 2])
def test_a_bad_answer_for_one_unit_changes_nothing_and_is_named(size):
    for found in run_ranks(at_once, size, [*BAD, *KNOWN], False):
        for name, (said, same, coef) in found.items():
            (message,) = said
            begins = (BAD | KNOWN)[name][1]
            assert message.startswith(f"ValueError: Answers.decide returned {begins}"), name
            assert "and no step was made: return " in message
            assert same, name
            assert 0 < coef < 1


def on_device_at_once() -> dict[str, Any]:
    with on_the_accelerator():
        return at_once(list(KNOWN), True)


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
@pytest.mark.parametrize("size", [1, 2])
def test_an_accelerator_refuses_at_once_what_it_knows_without_reading(size):
    for found in run_ranks(on_device_at_once, size, fresh=True):
        for name, (said, same, _) in found.items():
            (message,) = said
            assert message.startswith(f"ValueError: Answers.decide returned {KNOWN[name][1]}"), name
            assert same, name


def one_call_late() -> dict[str, Any]:
    found = {}
    with on_the_accelerator():
        for name, (answer, _) in BAD.items():
            for nonfinite in ("skip", "propagate"):
                model, policy = layers(), Answers()
                clipper, optimizer = distclip.Clipper(model, policy, nonfinite=nonfinite), adamw(model)
                good = policy.answer
                for seed in range(2):  # calls in which copies are compared
                    fill(model, seed)
                    clipper.step(optimizer)
                fill(model, 3)
                before, gradients = [raw(p.detach()).clone() for p in model], [raw(p.grad).clone() for p in model]
                policy.answer = answer
                with no_waits():
                    looked, report = clipper.measure(), clipper.step(optimizer)
                same = same_tensors(before, [raw(p.detach()) for p in model])
                untouched, policy.answer = same_tensors(gradients, [raw(p.grad) for p in model]), good
                numbers = [raw(x).item() for x in (looked.norm, report.norm, report.coef, report.skip)]
                said, again = told_by(lambda c=clipper, o=optimizer: c.step(o)), told_by(clipper.clip_)
                found[name, nonfinite] = numbers, same, untouched, said, again
    return found


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
@pytest.mark.parametrize("size", [1, 2])
def test_an_accelerator_skips_the_step_of_a_bad_unit_and_names_it_one_call_late(size):
    for found in run_ranks(one_call_late, size, fresh=True):
        for (name, _), (numbers, same, untouched, said, again) in found.items():
            assert all(map(isnan, numbers[:2])), name
            assert numbers[2:] == [1.0, 1.0], "nothing is scaled, and the step is skipped"
            assert same, name
            assert untouched, name
            field, unit = BAD[name][1].split(" = ")[0], BAD[name][1].partition(" for ")[2]
            assert said.startswith(f"ValueError: Answers.decide returned a {field} for {unit} that no step can use, ")
            assert again == ""


def bad_on_one_rank() -> list[str]:
    model = ddp()
    policy = Answers({"max_norm": 1.0})
    policy.needs = lambda: (Statistic("parameter"),)
    clipper = distclip.Clipper(model, policy)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if dist.get_rank():
        policy.answer = {"max_norm": -1.0}
    return [told_by(clipper.clip_) for _ in range(2)]


def test_a_bad_answer_on_one_rank_alone_is_an_error_on_all_in_the_next_call():
    other, own = run_ranks(bad_on_one_rank, 2)
    assert other[0] == ""
    assert own[0].startswith("ValueError: Answers.decide returned max_norm = -1.0 for embed.weight (unit 0 of ")
    assert other[1].startswith("LayoutError: ")
    assert own[1].startswith("LayoutError: ")
