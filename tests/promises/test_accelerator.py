"""What a Clipper promises on accelerators, on one that is not there: it waits for nothing, and can be captured."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf, isnan
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip.ranks.group import ClippingGroup
from support.accelerator import (
    DEVICE,
    EXISTS,
    Event,
    Wait,
    all_reduce,
    all_to_all,
    capture,
    capturing,
    counted_waits,
    no_waits,
    pinned_like,
    raw,
    use_accelerator,
)
from support.oracle import true_norm
from support.ranks import run_ranks
from support.samples import crossed

pytestmark = pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")

POLICIES = {
    "max_norm": 1.0,
    "autoclip": distclip.AutoClip(percentile=50, window=4),
    "values": distclip.ValueClip(0.5),
}
OPTIONS = [{}, {"norm_type": 1.0}, {"norm_type": 3.0}, {"norm_type": inf}, {"nonfinite": "propagate"}]
READING = [{"nonfinite": "raise"}, {"norm_type": 9.0}]
EVERYBODY = pytest.mark.parametrize("size", [1, 2])
EACH_POLICY = pytest.mark.parametrize(("policy", "size"), crossed(POLICIES, (2, 1)))


@contextmanager
def as_promised(call: int) -> Iterator[None]:
    """No wait inside, but two in calls 1, 2, 4, 8, ... of a Clipper, in which ranks compare their copies."""
    if dist.get_world_size() == 1 or call & (call - 1):
        with no_waits():
            yield
        return
    with counted_waits() as waits:
        yield
    assert waits == [2]


def more_in(calls: int, size: int) -> list[int]:
    """The waits that comparing copies adds to each of so many calls."""
    return [2 if size > 1 and call & (call - 1) == 0 else 0 for call in range(1, calls + 1)]


@contextmanager
def on_the_accelerator(words_on_the_device: bool = True) -> Iterator[None]:
    """Words travel on the device as with NCCL, or on the host as with Gloo."""
    use_accelerator()
    device = torch.device(DEVICE, 0) if words_on_the_device else torch.device("cpu")
    with (
        patch("torch.Event", Event),
        patch("distclip.kernels.transfer.pinned_like", pinned_like),
        patch("distclip.step.progress.in_capture", capturing),
        patch("torch.distributed.all_reduce", all_reduce),
        patch("torch.distributed.all_to_all_single", all_to_all),
        patch.object(ClippingGroup, "device_for", lambda group, tensors: device),
    ):
        yield


def model_of(*shapes: tuple[int, ...]) -> nn.ParameterList:
    torch.manual_seed(0)
    return nn.ParameterList(nn.Parameter(torch.randn(shape).to(DEVICE)) for shape in shapes)


def layers() -> nn.ParameterList:
    return model_of((7, 5), (3,), (2, 2), (40, 3))


def fill(model: nn.ParameterList, seed: int, scale: float = 1.0) -> float:
    """Write gradients, the same on all ranks, where there are some already; their norm."""
    for i, parameter in enumerate(model):
        values = scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + i))
        if parameter.grad is None:
            parameter.grad = values.to(DEVICE)
        else:
            raw(parameter.grad).copy_(values)
    return norm_of(model)


def norm_of(model: nn.ParameterList, p: float = 2.0) -> float:
    return true_norm([raw(parameter.grad) for parameter in model if parameter.grad is not None], p)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True, capturable=True)


def steps(policy: str) -> list[tuple[float, float]]:
    """clip_() and step() under every option, none of which may wait; reported norms beside those of an oracle."""
    seen = []
    with on_the_accelerator():
        for options in OPTIONS:
            model = layers()
            clipper, optimizer, calls = distclip.Clipper(model, POLICIES[policy], **options), adamw(model), 0
            for step in range(6):
                for clip in (clipper.clip_, lambda optimizer=optimizer, clipper=clipper: clipper.step(optimizer)):
                    fill(model, step, scale=10.0 ** -(step % 3))
                    if step == 2:
                        model[1].grad = None  # not used in this step
                    right = norm_of(model, options.get("norm_type", 2.0))
                    calls += 1
                    with as_promised(calls):
                        report = clip()
                    seen.append((raw(report.norm).item(), right))
    return seen


@EACH_POLICY
def test_nothing_waits(policy, size):
    for norm, right in run_ranks(steps, size, policy, fresh=True)[0]:
        assert norm == pytest.approx(right, rel=2e-7)


def functions() -> list[tuple[float, float]]:
    """The functions, on plans that are new and on those kept; a step with a scaler."""
    seen = []
    with on_the_accelerator():
        model = layers()
        for step in range(3):
            for p in (2.0, inf):
                right = fill(model, step) if p == 2.0 else norm_of(model, p)
                with no_waits():
                    norms = [distclip.get_total_norm([parameter.grad for parameter in model], norm_type=p)]
                    norms.append(distclip.clip_grad_norm_(model.parameters(), 1e9, norm_type=p))
                    distclip.clip_grads_with_norm_(model.parameters(), 1e9, norms[0])
                    distclip.clip_grad_value_(model.parameters(), 1e9)
                seen += [(raw(norm).item(), right) for norm in norms]
        clipper, optimizer, scaler = distclip.Clipper(model, 1.0), adamw(model), torch.amp.GradScaler(DEVICE)
        for step in range(3):
            right = fill(model, step) / scaler.get_scale() if step else fill(model, step) / 2**16
            scaler.scale(torch.ones(()).to(DEVICE))
            with as_promised(step + 1):
                norm = clipper.step(optimizer, scaler=scaler).norm
                scaler.update()
            seen.append((raw(norm).item(), right))
    return seen


@EVERYBODY
def test_functions_and_steps_with_a_scaler_do_not_wait(size):
    for norm, right in run_ranks(functions, size, fresh=True)[0]:
        assert norm == pytest.approx(right, rel=2e-7)


def five() -> tuple[float, list[float]]:
    """The norm, which is 5, and what the function that clips to 1 without a wait makes of the gradient."""
    with on_the_accelerator():
        model = model_of((2,))
        model[0].grad = torch.tensor([3.0, 4.0]).to(DEVICE)
        with no_waits():
            norm = distclip.clip_grad_norm_(model.parameters(), 1.0)
        return raw(norm).item(), raw(model[0].grad).tolist()


def test_a_function_that_does_not_wait_clips_all_the_same():
    assert run_ranks(five, 1, fresh=True) == [(5.0, pytest.approx([0.6, 0.8]))]


def attached(words_on_the_device: bool) -> list[list[int]]:
    """How often the steps of a fused and of another optimizer wait, that were made to clip."""
    counts = []
    with on_the_accelerator(words_on_the_device):
        for optimizer_of in (adamw, lambda model: torch.optim.RMSprop(model.parameters(), foreach=False)):
            model = layers()
            optimizer = optimizer_of(model)
            clip = distclip.attach(optimizer, model, 1.0)
            for step in range(3):
                right = fill(model, step)
                with counted_waits() as waits:
                    optimizer.step()
                assert raw(clip.report.norm).item() == pytest.approx(right, rel=2e-7)
                counts.append(waits)
    return counts


@EVERYBODY
@pytest.mark.parametrize(("words_on_the_device", "expected"), [(True, [0] * 3 + [1] * 3), (False, [1] * 6)])
def test_attached_steps_wait_for_the_words_alone_or_to_know_whether_to_step(words_on_the_device, expected, size):
    more = more_in(3, size) * 2
    if not words_on_the_device:  # numbers of copies are brought there too, and in each step their bits
        more = [min(each, 1) + (size > 1) for each in more]
    counts = run_ranks(attached, size, words_on_the_device, fresh=True)[0]
    assert counts == [[waits + extra] for waits, extra in zip(expected, more, strict=True)]


def reading_steps(policy: str) -> list[int]:
    """How often one call waits that has to know the norm."""
    counts = []
    with on_the_accelerator():
        for options in READING:
            model = layers()
            clipper, optimizer = distclip.Clipper(model, POLICIES[policy], **options), adamw(model)
            plain = torch.optim.RMSprop(model.parameters(), lr=1e-3)
            for step in range(3):
                for clip in (clipper.clip_, lambda c=clipper, o=optimizer: c.step(o)):
                    fill(model, step)
                    with counted_waits() as waits:
                        clip()
                    counts += waits
        clipper = distclip.Clipper(model, POLICIES[policy])
        for step in range(3):
            fill(model, step)
            with counted_waits() as waits, patch.object(plain, "step"):
                clipper.step(plain)  # which cannot fold: its step may have to be skipped
            counts += waits
    return counts


def told_steps() -> list[int]:
    """The same where a layout is told, so that two words more have to be read."""
    counts = []
    with on_the_accelerator():
        for options in ({}, {"nonfinite": "raise"}):
            model = layers()
            clipper = distclip.Clipper(model, 1.0, layout=lambda name, parameter: None, **options)
            for step in range(2):
                fill(model, step)
                with counted_waits() as waits:
                    clipper.clip_()
                counts += waits
    return counts


def test_words_that_have_to_be_read_cost_a_wait_of_their_own():
    expected = [1 + more for more in more_in(2, 2)] + [2 + more for more in more_in(2, 2)]
    assert run_ranks(told_steps, 2, fresh=True) == [expected] * 2


@EACH_POLICY
def test_what_has_to_know_the_norm_waits_once(policy, size):
    expected = [1 + more for more in (*more_in(6, size), *more_in(6, size), *more_in(3, size))]
    assert run_ranks(reading_steps, size, policy, fresh=True)[0] == expected


def on_two_devices() -> list[tuple[list[int], list[float]]]:
    """Gradients on the accelerator and on the host: how often a call waits, and what it leaves of ones."""
    seen = []
    with on_the_accelerator():
        for policy in (1.0, 1e9, distclip.ValueClip(0.25)):
            model = nn.ParameterList([nn.Parameter(torch.ones(300).to(DEVICE)), nn.Parameter(torch.ones(100))])
            for parameter in model:
                parameter.grad = torch.ones_like(parameter)
            clipper = distclip.Clipper(model, policy)
            with counted_waits() as waits:
                report = clipper.clip_()
            assert raw(report.norm).item() == 20.0
            seen.append((waits, [raw(parameter.grad)[-1].item() for parameter in model]))
    return seen


@EVERYBODY
def test_gradients_on_the_host_beside_those_on_the_accelerator(size):
    """They wait for the factor, and for whether to skip, neither of which may be read before it has arrived."""
    clipped, untouched, clamped = run_ranks(on_two_devices, size, fresh=True)[0]
    (more,) = more_in(1, size)
    assert clipped == ([1 + more], [pytest.approx(0.05)] * 2)
    assert untouched == ([1 + more], [1.0] * 2)
    assert clamped == ([1 + more], [0.25] * 2)  # which no factor is sent for


def bad_steps() -> dict[str, object]:
    """A NaN between good steps: nothing waits, nothing changes, and the next call names it."""
    with on_the_accelerator():
        model = layers()
        clipper, optimizer = distclip.Clipper(model, 1.0), adamw(model)
        for step in range(2):
            fill(model, step)
            clipper.step(optimizer)
        before = [raw(parameter).clone() for parameter in model]
        fill(model, 2)
        if dist.get_rank() == dist.get_world_size() - 1:
            raw(model[2].grad)[0, 1] = torch.nan
        with no_waits():
            report = clipper.step(optimizer)
        same = all(torch.equal(raw(parameter), kept) for parameter, kept in zip(model, before, strict=True))
        unknown = clipper.culprit is None
        fill(model, 3)
        clipper.step(optimizer)
        return {
            "norm": raw(report.norm).item(),
            "skip": raw(report.skip).item(),
            "same": same,
            "unknown": unknown,
            "culprit": str(clipper.culprit),
        }


@EVERYBODY
def test_a_step_that_is_not_finite_is_skipped_and_named_without_a_wait(size):
    for seen in run_ranks(bad_steps, size, fresh=True):
        assert isnan(seen["norm"])
        assert (seen["skip"], seen["same"], seen["unknown"]) == (True, True, True)
        assert f"rank {size - 1}" in seen["culprit"]


def faults() -> list[tuple[str, str]]:
    """What ranks that do not agree are told, and when: in the same call where it was waited for, else in the next."""
    told = []
    last = dist.get_rank() == dist.get_world_size() - 1

    def expect(name, call) -> None:
        try:
            call()
            told.append((name, ""))
        except (distclip.LayoutError, distclip.NonFiniteError, ValueError) as error:
            told.append((name, f"{type(error).__name__}: {error}"))

    with on_the_accelerator():
        model = layers()
        clipper = distclip.Clipper(model, 1.0)
        fill(model, 0)
        expect("verify", clipper.verify)
        raw(model[0].grad).mul_(1.5 if last else 1.0)
        expect("verify, copies apart", clipper.verify)
        expect("copies apart in a call that compares", clipper.clip_)
        fill(model, 0)
        clipper.clip_()  # the second call, which compares as well
        fill(model, 0)
        raw(model[0].grad).mul_(1.5 if last else 1.0)
        expect("copies apart", clipper.clip_)
        expect("after copies apart", clipper.clip_)
        clipper = distclip.Clipper(model, 1.0)
        fill(model, 1)
        model[1].grad = None if last else model[1].grad
        expect("one gradient missing", clipper.clip_)
        expect("after one was missing", clipper.clip_)
        clipper = distclip.Clipper(model, 1.0, max_consecutive_skips=1)
        for step in range(3):
            fill(model, step)
            raw(model[2].grad)[0, 0] = inf
            expect(f"inf {step}", clipper.clip_)
        expect("function", lambda: distclip.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True))
        expect("parameters", lambda: distclip.Clipper(model_of((2,), (2 + last,)), 1.0))
        expect("policies", lambda: distclip.Clipper(model, 1.0 + last))
    return told


def test_ranks_that_do_not_agree_are_told_what_they_are_told_on_the_host():
    for told in map(dict, run_ranks(faults, 2, fresh=True)):
        assert [name for name, said in told.items() if not said] == [
            *("verify", "copies apart", "one gradient missing", "inf 0", "inf 1")
        ]
        assert "hold the same gradient do not: 0" in told["verify, copies apart"]
        assert "hold the same gradient do not: 0" in told["copies apart in a call that compares"]
        assert "LayoutError: copies of gradients differ between ranks since step 1" in told["after copies apart"]
        assert "lacks a gradient" in told["after one was missing"]
        assert "NonFiniteError: 2 steps in a row" in told["inf 2"]
        assert "2 has inf in its reduced gradient, held by ranks 0, 1; " in told["inf 2"]
        assert "has inf in its gradient" in told["function"]
        assert "rank 1: 2 parameters of 5 elements" in told["parameters"]
        assert "rank 1: policy MaxNorm(max_norm=2.0)" in told["policies"]


def replayed(policy: str, kind: str) -> list[tuple[float, float, float]]:
    """Replays of a captured call, beside calls of a Clipper that was not captured: norm, coefficient, difference."""
    seen = []
    with on_the_accelerator():
        for options in OPTIONS:
            models = [layers(), layers()]
            clippers = [distclip.Clipper(model, POLICIES[policy], **options) for model in models]
            optimizers = [adamw(model) for model in models]
            calls = [
                c.clip_ if kind == "clip_" else (lambda c=c, o=o: c.step(o))
                for c, o in zip(clippers, optimizers, strict=True)
            ]
            for model, call in zip(models, calls, strict=True):  # warm: the optimizer makes its state
                fill(model, 0)
                call()
            fill(models[0], 1)
            fill(models[1], 1)
            with capture() as graph:
                report = calls[0]()  # done here as well, unlike on a GPU
            calls[1]()
            for seed, scale in enumerate((1.0, 1e-3, 30.0, 1e-5, 2.0)):
                for model in models:
                    fill(model, 2 + seed, scale)
                graph.replay()
                right = calls[1]()
                apart = [
                    (raw(a) - raw(b)).abs().max().item() + (raw(a.grad) - raw(b.grad)).abs().max().item()
                    for a, b in zip(*models, strict=True)
                ]
                seen.append(
                    (
                        raw(report.norm).item() - raw(right.norm).item(),
                        raw(report.coef).item() - raw(right.coef).item(),
                        max(apart),
                    )
                )
            assert clippers[0].state_dict()["policy"].keys() == clippers[1].state_dict()["policy"].keys()
            for name, value in clippers[0].state_dict()["policy"].items():
                assert torch.equal(raw(value), raw(clippers[1].state_dict()["policy"][name])), name
    return seen


CAPTURED = [("clip_", 1), ("step", 2), ("clip_", 2), ("step", 1)]


@pytest.mark.parametrize(("policy", "kind", "size"), crossed(POLICIES, CAPTURED))
def test_a_captured_call_does_in_every_replay_what_the_call_does(policy, kind, size):
    for seen in run_ranks(replayed, size, policy, kind, fresh=True):
        assert seen == [(0.0, 0.0, 0.0)] * 5 * len(OPTIONS)


def captures_that_read() -> list[str]:
    said = []
    with on_the_accelerator():
        for options in READING:
            model = layers()
            clipper = distclip.Clipper(model, 1.0, **options)
            fill(model, 0)
            clipper.clip_()
            try:
                with capture():
                    clipper.clip_()
            except RuntimeError as error:
                said.append(str(error))
    return said


def test_what_has_to_read_the_norm_cannot_be_captured_and_says_so():
    for said in run_ranks(captures_that_read, 1, fresh=True):
        assert len(said) == len(READING)
        assert all("CUDA graph" in line for line in said)


class Answers:
    """A policy that answers with numbers of the device, and of the host where they are no tensors."""

    def __init__(self, **numbers) -> None:
        self.numbers = numbers

    def needs(self):
        return ()

    def init(self, units, device):
        return {"n": torch.zeros((), dtype=torch.float64, device=device)}

    def decide(self, statistics, state):
        def here(number):
            return torch.full_like(statistics.norm(), number[0]) if isinstance(number, list) else number

        answer = {name: tuple(map(here, n)) if name == "bounds" else here(n) for name, n in self.numbers.items()}
        return distclip.Decision(**{"max_norm": here([inf]), **answer}), {"n": state["n"] + 1}


BAD = {
    "max_norm of -1": {"max_norm": [-1.0]},
    "max_norm of NaN, not to be skipped": {"max_norm": [torch.nan], "skip": False},
    "max_norm of the host": {"max_norm": 0.0},
    "coef of 0": {"coef": [0.0]},
    "coef of inf, of the host": {"coef": inf},
    "bounds of the device": {"bounds": ([5.0], [6.0])},
    "bounds of both": {"bounds": ([5.0], 6.0)},
}


def bad_answers() -> list[dict[str, object]]:
    """A step that a policy's answer spoils, between good ones; what was told in the next, and where a step reads."""
    seen = []
    with on_the_accelerator():
        for bad in BAD.values():
            for nonfinite in ("skip", "propagate"):
                model, policy = layers(), Answers(max_norm=[1.0])
                clipper, optimizer = distclip.Clipper(model, policy, nonfinite=nonfinite), adamw(model)
                for _ in range(2):  # calls in which copies are compared
                    fill(model, 0)
                    clipper.step(optimizer)
                before, good = [raw(parameter).clone() for parameter in model], policy.numbers
                policy.numbers = bad
                fill(model, 1)
                with no_waits():
                    looked, report = clipper.measure(), clipper.step(optimizer)
                same = all(torch.equal(raw(parameter), kept) for parameter, kept in zip(model, before, strict=True))
                policy.numbers = good
                fill(model, 2)
                told = ""
                try:
                    clipper.step(optimizer)
                except ValueError as error:
                    told = str(error)
                right = fill(model, 2)
                norm = raw(clipper.step(optimizer).norm).item()
                policy.numbers = bad
                fill(model, 3)
                plain, at_once = torch.optim.RMSprop(model.parameters(), foreach=False), ""
                with counted_waits() as waits:
                    try:
                        clipper.step(plain)  # which cannot skip without knowing
                    except ValueError as error:
                        at_once = str(error)
                norms = [raw(looked.norm).item(), raw(report.norm).item()]
                skips = [raw(looked.skip).item(), raw(report.skip).item()]
                steps = clipper.state_dict()["steps"]
                seen.append((norms, skips, same, told, norm == pytest.approx(right, rel=2e-7), waits, at_once, steps))
    return seen


@EVERYBODY
def test_a_bad_answer_skips_its_step_without_a_wait_and_the_next_call_names_it(size):
    for seen in run_ranks(bad_answers, size, fresh=True):
        names = [name for name in BAD for _ in range(2)]
        for name, (norms, skips, same, told, goes_on, waits, at_once, steps) in zip(names, seen, strict=True):
            assert all(map(isnan, norms)), name
            assert skips == [True, True]
            assert same
            says = f"Answers.decide returned a {name.split()[0]} that no step can use, and no step was made: return "
            assert told.startswith(says)
            assert goes_on
            assert waits == [1]
            assert at_once.startswith(says)
            assert steps == 4  # the bad one, which was skipped, and three good ones


def known_at_once() -> list[str]:
    """What needs no look at the device."""
    said = []
    with on_the_accelerator():
        for answer in (
            Answers(bounds=(5.0, 6.0)),
            Answers(max_norm="1"),
            Answers(max_norm=torch.ones(2).to(DEVICE)),
            Answers(skip="no"),
        ):
            model = layers()
            fill(model, 0)
            clipper = distclip.Clipper(model, answer)
            try:
                with no_waits():
                    clipper.clip_()
            except ValueError as error:
                said.append(str(error))
            assert clipper.state_dict()["steps"] == 0
        clipper.policy.decide = lambda statistics, state: (distclip.Decision(1.0), {"n": state["n"].float()})
        try:
            with no_waits():
                clipper.measure()
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_is_known_of_an_answer_without_a_wait_is_refused_at_once():
    (said,) = run_ranks(known_at_once, 1, fresh=True)
    assert [line.removeprefix("Answers.decide returned ").split()[0] for line in said] == [
        *("bounds", "max_norm", "max_norm", "skip", "state")
    ]


def clamped() -> list[tuple[float, float]]:
    """The largest and smallest element after clamping to bounds that the host does not know."""
    seen = []
    with on_the_accelerator():
        for skip, nonfinite in ((None, "propagate"), ([0.0], "skip"), ([1.0], "skip")):
            model = layers()
            fill(model, 0)
            answer = Answers(bounds=([-0.25], [0.5]), **({} if skip is None else {"skip": skip}))
            clipper = distclip.Clipper(model, answer, nonfinite=nonfinite)
            with no_waits():
                clipper.clip_()
            every = torch.cat([raw(parameter.grad).flatten() for parameter in model])
            seen.append((every.min().item(), every.max().item()))
    return seen


def test_element_bounds_may_be_numbers_of_the_device():
    (plain, told, skipped) = run_ranks(clamped, 1, fresh=True)[0]
    assert plain == told == (-0.25, 0.5)
    assert skipped[0] < -1 < 1 < skipped[1]


def clamped_beyond_the_range(bounds: tuple[object, object]) -> list[list[float]]:
    """fp16 and fp32 gradients of inf and 3 after clamping by a policy whose bounds no fp16 number can be."""
    with on_the_accelerator():
        model = nn.ParameterList(nn.Parameter(torch.zeros(3, dtype=d).to(DEVICE)) for d in (torch.half, torch.float))
        for parameter in model:
            parameter.grad = torch.tensor([inf, 3.0, -inf]).to(raw(parameter).dtype).to(DEVICE)
        clipper = distclip.Clipper(model, Answers(bounds=bounds), nonfinite="propagate")
        with no_waits():
            clipper.clip_()
        return [raw(parameter.grad).tolist() for parameter in model]


@pytest.mark.parametrize("bounds", [(-1e5, inf), ([-1e5], [inf])], ids=["of the host", "of the device"])
def test_element_bounds_beyond_the_range_of_a_dtype_are_its_largest_numbers(bounds):
    (found,) = run_ranks(clamped_beyond_the_range, 1, bounds, fresh=True)
    assert found == [[inf, 3.0, -65504.0], [inf, 3.0, -1e5]]


def huge() -> list[tuple[float, float, float]]:
    """Gradients of 1e38 under a tiny bound, folded and not: norm, coefficient, and what an element became or moved."""
    seen = []
    with on_the_accelerator():
        for nonfinite in ("skip", "propagate"):
            for how in ("clip_", "fused", "not fused", "function"):
                model = model_of((2, 2))
                model[0].grad = torch.full((2, 2), 1e38).to(DEVICE)
                clipper = distclip.Clipper(model, 1e-3, nonfinite=nonfinite)
                coef = torch.zeros(())
                with counted_waits() as waits:
                    if how == "clip_":
                        coef = clipper.clip_().coef
                    elif how == "function":
                        distclip.clip_grad_norm_(model.parameters(), 1e-3)
                    elif how == "fused":
                        coef = clipper.step(adamw(model)).coef
                    else:
                        coef = clipper.step(torch.optim.SGD(model.parameters(), lr=0.0, foreach=False)).coef
                seen.append((how, waits, raw(coef).item(), norm_of(model)))
    return seen


def test_a_coefficient_that_float32_cannot_hold_is_its_least_one_where_the_host_does_not_know_it():
    """No gradient becomes zero; where the host has to wait for the norm anyway, nothing is lost either."""
    least = torch.finfo(torch.float32).smallest_normal
    for how, waits, coef, norm in run_ranks(huge, 1, fresh=True)[0]:
        assert coef == (0.0 if how == "function" else pytest.approx(least))
        if waits == [1]:
            assert how == "not fused"
            assert norm == pytest.approx(1e-3, rel=1e-6)
        else:
            assert waits == [0]
            assert norm == pytest.approx(2e38 * least, rel=1e-6)


def simulated() -> list[bool]:
    """Whether the accelerator tells what it should: copies, reads, and tensors of the host."""
    use_accelerator()
    x = torch.arange(6.0).to(DEVICE)
    waiting = {
        "item": lambda: x.sum().item(),
        "tolist": lambda: x.tolist(),
        "to the host": lambda: x.to("cpu"),
        "from the host": lambda: torch.ones(2).to(DEVICE),
        "a list made a tensor": lambda: torch.tensor([1.0, 2.0], device=DEVICE),
        "by a list": lambda: x[[1, 2]],
        "by a mask": lambda: x[x > 2],
        "if": lambda: 1 if (x > 2).all() else 2,
    }
    free = [lambda: x * 2, lambda: torch.ones(2).to(DEVICE, non_blocking=True), lambda: x * torch.tensor(2.0)]
    found = []
    with no_waits():
        for call in waiting.values():
            try:
                call()
                found.append(False)
            except Wait:
                found.append(True)
        for call in free:
            call()
    return found


def test_the_accelerator_knows_a_wait():
    assert run_ranks(simulated, 1, fresh=True)[0] == [True] * 8
