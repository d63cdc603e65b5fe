"""`Log`: which steps have a record and what is in it, on one rank and on two, on the host and on an accelerator."""

import json
import math
import warnings
from collections.abc import Sequence
from math import inf, isnan, nan
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distclip import Clipper, MaxNorm, PerParameter, Shadow, SkipSpikes, attach
from distclip.bench.place import Place
from distclip.bench.subject import fsdp2
from distclip.telemetry import JsonLines, Log, keys
from promises.test_accelerator import EXISTS, on_the_accelerator
from support.accelerator import DEVICE, Event, no_waits
from support.ranks import count_collectives, run_ranks, same_bits

NORMS = [0.5, 3.0, 2.0, 0.25, 4.0, 0.5, 8.0]
ON_THE_ACCELERATOR = pytest.mark.skipif(not EXISTS, reason="this torch has no backend for devices written in Python")


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def __call__(self, numbers: dict[str, float], step: int) -> None:
        self.records.append((step, numbers))

    def close(self) -> None:
        self.closed += 1

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.records]

    def all(self, key: str) -> list[float]:
        return [numbers[key] for _, numbers in self.records]


def two(device: str = "cpu") -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(4, 1, bias=False) for name in ("a", "b")}).to(device)


def clip(clipper: Clipper, model: nn.Module, norm: float) -> None:
    """One call, on gradients of this norm: 0.6 of it in the first parameter, 0.8 in the second."""
    for parameter, share in zip(model.parameters(), (0.6, 0.8), strict=True):
        parameter.grad = torch.full(parameter.shape, share * norm / 2).to(parameter.device)
    clipper.clip_()


def logged(norms: Sequence[float], every: int, policy: Any = 1.0, close: bool = True, **options: Any) -> Kept:
    model, sink = two(), Kept()
    clipper = Clipper(model, policy, **options)
    log = Log(clipper, sink, every=every)
    for norm in norms:
        clip(clipper, model, norm)
    if close:
        log.close()
    return sink


# ---- what is in a record ----------------------------------------------------------------------------------------


def test_a_record_has_the_numbers_of_its_step_and_what_was_since_the_last():
    sink = logged(NORMS[:6], every=3, watch="parameters", close=False)
    (third, of_third), (sixth, of_sixth) = sink.records
    assert (third, sixth) == (3, 6)
    assert of_third == pytest.approx(
        {
            "grad_norm/layer/a.weight": 1.2,
            "grad_norm/layer/b.weight": 1.6,
            "grad_norm/pre_clip": 2.0,
            "grad_norm/post_clip": 1.0,
            "clip/coef": 0.5,
            "clip/max_norm": 1.0,
            "clip/clipped": 1.0,
            "clip/skipped": 0.0,
            "clip/fraction": 2 / 3,
            "grad_norm/max": 3.0,
        },
        rel=1e-6,
    )
    assert of_sixth == pytest.approx(
        of_third
        | {
            "grad_norm/layer/a.weight": 0.3,
            "grad_norm/layer/b.weight": 0.4,
            "grad_norm/pre_clip": 0.5,
            "grad_norm/post_clip": 0.5,
            "clip/coef": 1.0,
            "clip/clipped": 0.0,
            "clip/fraction": 1 / 3,
            "grad_norm/max": 4.0,
        },
        rel=1e-6,
    )
    assert {type(number) for _, numbers in sink.records for number in numbers.values()} == {float}


def test_shares_of_zeros_are_recorded_beside_the_norms():
    model, sink = two(), Kept()
    clipper = Clipper(model, 1.0, watch={"all": "*", "b": "b.*"}, watch_zeros=True)
    Log(clipper, sink, every=1)
    for parameter, zeros in zip(model.parameters(), (4, 1), strict=True):
        parameter.grad = torch.ones(1, 4)
        parameter.grad[:, :zeros] = 0
    clipper.clip_()
    shown = {key: number for key, number in sink.records[0][1].items() if "/layer/" in key}
    assert shown == pytest.approx(
        {
            "grad_norm/layer/all": math.sqrt(3),
            "grad_norm/layer/b": math.sqrt(3),
            "grad_zeros/layer/all": 5 / 8,
            "grad_zeros/layer/b": 1 / 4,
        }
    )


def test_what_a_policy_reports_of_itself_is_recorded_and_replaces_nothing():
    policy = Shadow(1.0, tight=0.1)
    sink = logged([2.0], every=1, policy=policy)
    assert sink.records[0][1]["clip/tight/coef"] == pytest.approx(0.05, rel=1e-5)
    assert sink.records[0][1]["clip/coef"] == pytest.approx(0.5, rel=1e-5)


def test_the_coefficient_of_decisions_by_parameter_is_the_ratio_of_the_norms_of_the_model():
    sink = logged([2.0], every=1, policy=PerParameter(MaxNorm(1.2)))
    (_, numbers), after = sink.records[0], math.hypot(1.2, 1.2)
    assert numbers["grad_norm/post_clip"] == pytest.approx(after, rel=1e-5)
    assert numbers["clip/coef"] == pytest.approx(after / 2, rel=1e-5)
    assert (numbers["clip/clipped"], numbers["clip/max_norm"]) == (1.0, inf)


class Counting:
    """A policy that reports how many steps it has seen, from a state that each step overwrites."""

    def needs(self) -> list[Any]:
        return []

    def init(self, units: Any, device: torch.device) -> dict[str, torch.Tensor]:
        return {"steps": torch.zeros((), dtype=torch.float64, device=device)}

    def decide(self, statistics: Any, state: dict[str, torch.Tensor]) -> Any:
        from distclip import Decision

        steps = state["steps"].add_(1)
        return Decision(1.0, extra={"steps": steps}), {"steps": steps}


def test_what_a_policy_overwrites_in_the_next_step_was_recorded_before():
    sink = logged([2.0, nan, 2.0, 2.0], every=4, policy=Counting())
    assert sink.steps == [2, 4]
    assert sink.all("clip/steps") == [2.0, 4.0]


# ---- which steps have one ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "is_bad"), [(nan, isnan), (inf, lambda norm: norm == inf)])
def test_a_step_between_records_that_is_not_finite_has_one_with_the_layer_that_it_came_from(bad, is_bad):
    model, sink = two(), Kept()
    clipper = Clipper(model, 1.0, watch="parameters")
    Log(clipper, sink, every=4)
    for step in range(1, 5):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.full((1, 4), bad if (name, step) == ("b.weight", 2) else 0.1)
        clipper.clip_()
    assert sink.steps == [2, 4]
    (_, planted), (_, regular) = sink.records
    assert planted["clip/skipped"] == 1
    assert is_bad(planted["grad_norm/pre_clip"])
    assert is_bad(planted["grad_norm/layer/b.weight"])
    assert planted["grad_norm/layer/a.weight"] == pytest.approx(0.2)
    assert "clip/fraction" not in planted
    assert regular["grad_norm/max"] == pytest.approx(0.2 * math.sqrt(2))


def test_a_step_that_a_policy_skips_between_records_has_one():
    spiky = [1.0 + 0.01 * (step % 3) for step in range(40)]
    spiky[29] = 1000.0
    sink = logged(spiky, every=20, policy=SkipSpikes(window=16))
    assert sink.steps == [20, 30, 40]
    assert sink.all("clip/skipped") == [0.0, 1.0, 0.0]
    assert sink.all("grad_norm/pre_clip")[1] == 1000.0


def test_a_bad_step_whose_turn_it_is_has_one_record_and_counts_only_what_was_finite():
    sink = logged([2.0, nan, nan, nan], every=2)
    assert sink.steps == [2, 3, 4]
    assert sink.all("clip/skipped") == [1.0, 1.0, 1.0]
    assert [keys.LARGEST in numbers for _, numbers in sink.records] == [True, False, False]


def test_closing_writes_the_rest_once_and_leaves_the_clipper():
    model, sink = two(), Kept()
    clipper = Clipper(model, 1.0)
    with Log(clipper, sink, every=4) as log:
        for norm in NORMS[:6]:
            clip(clipper, model, norm)
    assert sink.steps == [4, 6]
    assert sink.all(keys.FRACTION) == [0.5, 0.5]
    assert sink.closed == 1
    log.close()
    clip(clipper, model, 1.0)
    assert (sink.steps, sink.closed) == ([4, 6], 1)


def test_a_log_needs_no_variable():
    model, sink = two(), Kept()
    clipper = Clipper(model, 1.0)
    Log(clipper, sink, every=1)
    clip(clipper, model, 2.0)
    assert sink.steps == [1]


def test_steps_go_on_after_a_resume_and_the_window_stays_bounded():
    model, sink = two(), Kept()
    first = Clipper(model, 1.0)
    for norm in NORMS:
        clip(first, model, norm)
    second = Clipper(model, 1.0)
    log = Log(second, sink, every=4)
    second.load_state_dict(first.state_dict())
    for norm in NORMS:
        clip(second, model, norm)
    assert sink.steps == [8, 12]
    for _ in range(3):  # back to step 9 before each fourth step
        clip(second, model, 1.0)
        second.load_state_dict(first.state_dict() | {"steps": 8})
    assert len(log._window) < 4


def test_under_attach_the_line_is_the_same():
    model, sink = two(), Kept()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = attach(optimizer, model, 1.0)
    with Log(clipper, sink, every=2):
        for norm in NORMS[:4]:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, norm / math.sqrt(8))
            optimizer.step()
    assert sink.steps == [2, 4]
    assert sink.all(keys.PRE_CLIP) == pytest.approx([3.0, 0.25], rel=1e-6)


# ---- sinks that fail, and what is refused -----------------------------------------------------------------------


class TrackersError(Exception):
    """As those of W&B and MLflow: of no class that Python has a reason for."""


@pytest.mark.parametrize("error", [OSError("disk full"), TrackersError("away"), KeyError("x")])
def test_a_sink_that_fails_warns_once_and_is_called_again_and_the_others_go_on(error):
    failures = [error, error]

    def failing(numbers: dict[str, float], step: int) -> None:
        numbers.clear()
        if failures:
            raise failures.pop()
        recovered.append(step)

    model, sink, recovered = two(), Kept(), list[int]()
    clipper = Clipper(model, 1.0)
    Log(clipper, failing, sink, every=1)
    with pytest.warns(RuntimeWarning, match=rf"failing failed.*{type(error).__name__}") as caught:
        clip(clipper, model, 2.0)
    assert [each.filename for each in caught] == [__file__]
    clip(clipper, model, 2.0)  # in which it fails once more: a second warning would be an error
    clip(clipper, model, 2.0)
    assert recovered == [3]
    assert sink.steps == [1, 2, 3]
    assert sink.records[0][1]["clip/coef"] == pytest.approx(0.5, rel=1e-5)  # not what another sink did to it


def test_a_sink_that_cannot_be_closed_warns():
    class Stuck(Kept):
        def close(self) -> None:
            raise TrackersError

    log = Log(Clipper(two(), 1.0), Stuck())
    with pytest.warns(RuntimeWarning, match=r"Stuck failed.*TrackersError"):
        log.close()


def test_ctrl_c_inside_a_sink_stops():
    def interrupted(numbers: dict[str, float], step: int) -> None:
        raise KeyboardInterrupt

    model = two()
    clipper = Clipper(model, 1.0)
    Log(clipper, interrupted, every=1)
    with pytest.raises(KeyboardInterrupt):
        clip(clipper, model, 2.0)


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "10"])
def test_every_is_a_number_of_steps(every):
    with pytest.raises(ValueError, match="every must be a whole number of steps"):
        Log(Clipper(two(), 1.0), Kept(), every=every)


@pytest.mark.parametrize("sinks", [[], ["run.jsonl"], [Kept(), None]])
def test_a_sink_is_a_function(sinks):
    with pytest.raises(ValueError, match=r"JsonLines\(path\) makes one"):
        Log(Clipper(two(), 1.0), *sinks)


# ---- ranks and devices ------------------------------------------------------------------------------------------


def on_a_rank(logs: bool) -> tuple[list[int], list[float], int]:
    model, sink = two(), Kept()
    clipper = Clipper(model, 1.0, watch="parameters")
    if logs:
        Log(clipper, sink, every=3)
    with count_collectives() as counts:
        for step, norm in enumerate(NORMS, 1):
            clip(clipper, model, nan if step == 5 else norm)
    return sink.steps, [clipper.report.norm.item()], counts.total()


def test_two_ranks_communicate_no_more_and_the_first_writes():
    (first, norm, collectives), (second, other, same) = run_ranks(on_a_rank, 2, True)
    assert (first, second) == ([3, 5, 6], [])
    assert same_bits([torch.tensor(norm), torch.tensor(other)])
    assert {collectives, same} == {result[2] for result in run_ranks(on_a_rank, 2, False)}


def collectives_of_steps(folder: str, watch: str | None, every: int | None) -> list[int]:
    """Of each of twelve training steps of 48 parameters under FSDP2."""
    model = fsdp2(Place.here(torch.device("cpu")), layers=4, width=8)
    optimizer = torch.optim.AdamW(model.parameters, lr=1e-3, fused=True)
    clipper = Clipper(model.model, 1e-6, watch=watch)
    sink = JsonLines(f"{folder}/telemetry.jsonl")
    if every is not None:
        Log(clipper, sink, every=every)
    found = []
    for _ in range(12):
        model.backward()
        with count_collectives() as counts:
            assert clipper.step(optimizer).coef < 1
        found.append(counts.total())
    sink.close()
    return found


def test_telemetry_of_every_parameter_adds_no_collective_to_any_step(tmp_path):
    plain = run_ranks(collectives_of_steps, 2, str(tmp_path), None, None)
    logged = run_ranks(collectives_of_steps, 2, str(tmp_path), "parameters", 10)
    assert logged == plain
    assert min(plain[0]) == 1  # more only in calls that compare replicas
    (line,) = (tmp_path / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()
    assert len([key for key in json.loads(line) if key.startswith("grad_norm/layer/")]) == 48


def in_groups() -> list[int]:
    groups = [dist.new_group([rank]) for rank in range(2)]
    model, sink = two(), Kept()
    clipper = Clipper(model, 1.0, group=groups[dist.get_rank()])
    Log(clipper, sink, every=1)
    clip(clipper, model, 2.0)
    return sink.steps


def test_the_first_rank_of_each_group_writes_what_its_clipper_does():
    assert run_ranks(in_groups, 2) == [[1], [1]]


class CountedEvent(Event):
    waits = 0

    def synchronize(self) -> None:
        CountedEvent.waits += 1
        super().synchronize()


def on_a_device(every: int, steps: int) -> tuple[list[int], list[float], int]:
    """The steps and norms recorded of the second half of the steps, and what their Log waited for."""
    with on_the_accelerator(), patch("torch.Event", CountedEvent):
        model, sink, waits = two(DEVICE), Kept(), list[int]()
        clipper = Clipper(model, 1.0, watch="parameters")
        clip(clipper, model, 1.0)  # the only step that has none before it to check
        for sinks in ([], [sink]):
            logs = [Log(clipper, each, every=every) for each in sinks]
            CountedEvent.waits = 0
            for step in range(1, steps + 1):
                clip(clipper, model, nan if step == 2 else step)
            waits.append(CountedEvent.waits)
        logs[0].close()
        return sink.steps, sink.all(keys.PRE_CLIP), waits[1] - waits[0]


@ON_THE_ACCELERATOR
@pytest.mark.parametrize("size", [1, 2])
def test_on_an_accelerator_ranks_wait_alike_once_a_record_in_the_step_after(size):
    results = run_ranks(on_a_device, size, 4, 12, fresh=True)
    assert {waits for _, _, waits in results} == {3}  # in steps 17, 21 and 25
    steps, norms, _ = results[0]
    assert steps == [15, 16, 20, 24, 25]
    assert isnan(norms[0])
    assert norms[1:] == [3.0, 7.0, 11.0, 12.0]
    assert all(result[0] == [] for result in results[1:])


def without_waits() -> None:
    with on_the_accelerator(), warnings.catch_warnings():
        model = two(DEVICE)
        clipper = Clipper(model, 1.0, watch="parameters")
        Log(clipper, Kept(), every=2)
        grads = [torch.full((1, 4), 1.0).to(DEVICE) for _ in range(2)]
        for _ in range(7):
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.grad = grad
            with no_waits():
                clipper.clip_()


@ON_THE_ACCELERATOR
def test_nothing_of_a_log_is_a_host_sync_but_the_wait_for_a_copy():
    run_ranks(without_waits, 1, fresh=True)


def test_steps_before_a_state_that_was_loaded_are_in_no_record():
    model, records = torch.nn.Linear(1, 1, bias=False), []
    clipper = Clipper(model, 1.0)
    log = Log(clipper, lambda numbers, step: records.append((step, numbers["grad_norm/max"])), every=4)

    def clip(norm: float) -> None:
        model.weight.grad = torch.full((1, 1), norm)
        clipper.clip_()

    clip(0.5)
    state = clipper.state_dict()
    clip(100.0)
    clipper.load_state_dict(state)
    for _ in range(3):
        clip(0.25)
    log.close()
    assert records == [(4, 0.25)]
