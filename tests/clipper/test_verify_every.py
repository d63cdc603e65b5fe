"""verify_every: what verify() proves, in each step that it divides, before anything is scaled or stepped."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD

import distclip
from promises.test_accelerator import fill, layers, on_the_accelerator
from support.accelerator import EXISTS, capture
from support.ranks import count_collectives, run_ranks


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    chance = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=chance)
    return model


def seeded() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def flip_a_bit(parameter: torch.Tensor) -> None:
    parameter.detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def said_by(call) -> str:
    try:
        call()
    except (distclip.LayoutError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def counts() -> dict[str, list[int]]:
    """Collectives of the steps, each by one verb; measure() before each counts for itself."""
    found = {"clip_": [], "step": [], "decide": [], "measure": []}
    for verb, seen in [(verb, seen) for verb, seen in found.items() if verb != "measure"]:
        model = seeded()
        clipper, optimizer = distclip.Clipper(model, 1.0, verify_every=3), SGD(model.parameters(), lr=0.0)
        call = {"clip_": clipper.clip_, "step": partial(clipper.step, optimizer), "decide": clipper.engine.decide}[verb]
        for step in range(7):
            filled(model, step)
            with count_collectives() as one:
                clipper.measure()
            with count_collectives() as other:
                call()
            found["measure"].append(one.total())
            seen.append(other.total())
    return found


def test_only_the_steps_that_it_divides_are_proved_whoever_steps():
    compares = [1, 1, 0, 1, 0, 0, 0]  # calls 1, 2, 4 compare copies
    proves = [0, 0, 3, 0, 0, 3, 0]
    expected = [1 + a + b for a, b in zip(compares, proves, strict=True)]
    steps = dict.fromkeys(("clip_", "step", "decide"), expected)
    assert run_ranks(counts, 2) == [{**steps, "measure": [1] * 21}] * 2


def drifts(how: str) -> tuple[list[str], bool]:
    """A bit of rank 1's copy flips before the second step; four proofs' worth of steps."""
    model = seeded()
    optimizer = SGD(model.parameters(), lr=0.0)
    clipper = distclip.Clipper(model, 1.0, verify_every=4)
    if how == "resumed":
        for _ in range(2):
            filled(model)
            clipper.step(optimizer)
        state, clipper = clipper.state_dict(), None
        clipper = distclip.Clipper(model, 1.0, verify_every=4)
        clipper.load_state_dict(state)
    if dist.get_rank() == 1:
        flip_a_bit(model.weight)
    met = []
    for step in range(clipper.steps, 4):
        filled(model, step)
        before = [p.grad.clone() for p in model.parameters()]
        met.append(said_by(lambda: clipper.step(optimizer)))
    return met, all(map(torch.equal, before, (p.grad for p in model.parameters())))


@pytest.mark.parametrize("how", ["from the start", "resumed"])
def test_a_copy_that_has_drifted_by_a_bit_is_named_in_the_step_that_proves_and_nothing_is_scaled(how):
    for met, untouched in run_ranks(drifts, 2, how):
        *others, last = met
        assert others == [""] * (1 if how == "resumed" else 3)
        assert last.startswith("LayoutError: copies have drifted apart: ranks hold different values of weight; ")
        assert untouched


def a_call_apart() -> str:
    """Rank 1 has made one call more, so that its step is to be proved when that of rank 0 is not."""
    model = filled(seeded())
    clipper = distclip.Clipper(model, 1.0, verify_every=2)
    clipper.engine.progress.calls.steps = dist.get_rank()
    return said_by(clipper.clip_)


def test_ranks_of_which_one_proves_disagree_at_once():
    for said in run_ranks(a_call_apart, 2):
        assert said.startswith("LayoutError: the ranks ")
        assert "verify() in step 1" in said
        assert "step 0" in said


def other_settings() -> str:
    return said_by(lambda: distclip.Clipper(seeded(), 1.0, verify_every=(None, 5)[dist.get_rank()]))


def test_it_must_be_the_same_on_all_ranks_and_a_number_of_steps():
    for said in run_ranks(other_settings, 2):
        assert said.startswith("ValueError: verify_every must be the same on every rank")
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="verify_every must be a whole number of at least 1"):
            distclip.Clipper(seeded(), 1.0, verify_every=wrong)


def left_out() -> tuple[str, str]:
    """Two optimizers, each attached to its half of a model; the gradients of the other half are of this rank alone."""
    halves = nn.ModuleList([seeded(), seeded()])
    optimizer = SGD(halves[0].parameters(), lr=0.0)
    clipper = distclip.attach(optimizer, halves, 1.0, verify_every=1)
    filled(halves[0])
    filled(halves[1], dist.get_rank())
    by_step, by_hand = said_by(optimizer.step), said_by(clipper.verify)
    return by_step, by_hand


def test_gradients_that_no_optimizer_holds_are_not_proved():
    for by_step, by_hand in run_ranks(left_out, 2):
        assert by_step == ""
        assert "ranks that should hold the same gradient do not: 1.weight, 1.bias" in by_hand


def test_a_second_clipper_is_found_in_the_step_that_proves():
    model, optimizers = seeded(), [SGD(seeded().parameters(), lr=0.1) for _ in range(2)]
    first, second = (distclip.Clipper(model, 1.0, verify_every=2) for _ in range(2))
    filled(model)
    assert said_by(first.clip_) == ""
    assert "1 other Clipper(s) hold parameters of this one" in said_by(first.clip_)
    assert said_by(first.measure) == ""
    del second, optimizers


def scaled() -> tuple[list[str], list[float]]:
    """fp16's loss scale: the gradients are unscaled when they are proved, and one of two proofs meets inf."""
    model = seeded()
    clipper, optimizer = distclip.Clipper(model, 1.0, verify_every=2), SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", init_scale=8.0)
    met, scales = [], []
    for step in range(4):
        scaler.scale(torch.ones(()))  # makes the scale
        filled(model, step)
        model.weight.grad[0, 0] = float("inf") if step == 1 else 1.0
        met.append(said_by(lambda: clipper.step(optimizer, scaler=scaler)))
        scaler.update()
        scales.append(scaler.get_scale())
    return met, scales


def test_scaled_gradients_are_proved_too():
    assert run_ranks(scaled, 2) == [([""] * 4, [8.0, 4.0, 4.0, 4.0])] * 2


def on_a_device() -> list[int]:
    """How many proofs there are of steps on an accelerator, the second of which is captured."""
    found = []
    with on_the_accelerator(), patch("distclip.step.proofs.verify") as verify:
        model = layers()
        clipper = distclip.Clipper(model, 1.0, nonfinite="propagate", verify_every=2)
        for step in range(4):
            fill(model, step)
            if step == 1:
                with capture():
                    clipper.clip_()
            else:
                clipper.clip_()
            found.append(verify.call_count)
    return found


def drifts_on_a_device() -> list[str]:
    with on_the_accelerator():
        model = layers()
        clipper = distclip.Clipper(model, 1.0, verify_every=3)
        met = []
        for step in range(3):
            fill(model, step, scale=1.0 + 1e-3 * dist.get_rank() * (step == 2))
            met.append(said_by(clipper.clip_))
    return met


@pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")
def test_on_accelerators_a_captured_step_is_not_proved_and_the_others_are():
    assert run_ranks(on_a_device, 1, fresh=True) == [[0, 0, 0, 1]]
    for met in run_ranks(drifts_on_a_device, 2, fresh=True):
        assert met[:2] == ["", ""]
        assert met[2].startswith("LayoutError: ranks that should hold the same gradient do not: 0, 1, 2, 3")
