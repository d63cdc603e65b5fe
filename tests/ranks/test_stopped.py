"""A rank that an exception keeps from the next collective: those who wait there are told why, long before the timeout.

Groups here have a timeout of minutes, so that a rank that waits for it does not finish.
"""

import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip.ranks import roll_call, slow_collective
from distclip.ranks.connections import channel, following, open_channel
from support.ranks import run_ranks

HOPE = 2  # in place of half a minute


class Ctrl(BaseException):
    """What a signal handler raises."""


class Once:
    """Raises once, when it is told to."""

    error: BaseException | None = None

    def maybe(self) -> None:
        if self.error is not None:
            error, self.error = self.error, None
            raise error


class Moody(Once):
    """The policy of ``MaxNorm(1.0)``, but for that."""

    def needs(self) -> tuple[()]:
        return ()

    def init(self, units: distclip.Units, device: torch.device) -> dict[str, torch.Tensor]:
        return {}

    def decide(self, statistics: distclip.Statistics, state: Any) -> Any:
        self.maybe()
        return distclip.Decision(1.0), state


class Failing(torch.optim.SGD, Once):
    def step(self, closure: Any = None) -> Any:
        self.maybe()
        return super().step(closure)


class Gradients(Once):
    def __call__(self, name: str, parameter: nn.Parameter) -> torch.Tensor | None:
        self.maybe()
        return parameter.grad


class Loop:
    """Calls of one Clipper. ``where``: the part of it that raises when it is told to."""

    def __init__(self, where: str) -> None:
        slow_collective.HOPE = HOPE
        self.net, self.group = nn.Linear(2, 2), dist.new_group(timeout=timedelta(minutes=5))
        self.optimizer = Failing(self.net.parameters(), lr=0.1)
        gradients = Gradients() if where == "gradients" else None
        policy = Moody() if where == "policy" else distclip.MaxNorm(1.0)
        self.clipper = distclip.Clipper(self.net, policy, group=self.group, gradients=gradients)
        self.part: Any = {"policy": policy, "optimizer": self.optimizer, "gradients": gradients}[where]

    def said(self, call: str, raises: BaseException | None = None) -> str:
        """How a call ends."""
        for parameter in self.net.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.part.error = raises
        calls: dict[str, Callable[[], object]] = {
            "measure": self.clipper.measure,
            "clip_": self.clipper.clip_,
            "step": lambda: self.clipper.step(self.optimizer),
        }
        try:
            calls[call]()
        except (ValueError, RuntimeError, OSError, Ctrl) as error:
            return f"{type(error).__name__}: {error}"
        return "right"

    def is_over(self) -> bool:
        """Whether nothing is left under way here, so that this process can end before the timeout."""
        works = [known.latest for length in (0, 2) if (known := channel(self.group, length)) and known.latest]
        deadline = time.monotonic() + 10
        while not all(work.is_completed() for work in works) and time.monotonic() < deadline:
            time.sleep(0.01)
        return all(work.is_completed() for work in works)


def meet(folder: str, ranks: int) -> None:
    """Wait for so many ranks, in no collective."""
    Path(folder).mkdir(exist_ok=True)
    Path(folder, str(dist.get_rank())).touch()
    while len(list(Path(folder).iterdir())) < ranks:
        time.sleep(0.02)


def at_once(*calls: tuple[Any, ...]) -> list[list[Any]]:
    """What run_ranks returns for each, side by side on fresh ranks, which wait for most of the time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: run_ranks(*call, fresh=True), calls))


def without_rank_1(folder: str, call: str, where: str, error: BaseException, then: str) -> tuple[list[str], bool]:
    """Rank 1 stops in its second call. It makes the third when the others have given theirs up, or leaves the group."""
    loop, stops = Loop(where), dist.get_rank() == 1
    said = [loop.said(call), loop.said(call, error if stops else None)]
    if stops and then == "leaves":
        del loop  # which closes its connections, as the end of the process would
        dist.destroy_process_group()
        gc.collect()
        return said, True
    if stops:
        meet(folder, dist.get_world_size())
    said.append(loop.said(call))
    over = loop.is_over()
    if not stops and then == "comes back":
        meet(folder, dist.get_world_size())
    return said, over


STOPS = {
    "clip_": ("clip_", "policy", ValueError("boom"), "rank 1 stopped in step 1: ValueError: boom"),
    "step": ("step", "policy", ValueError("boom"), "rank 1 stopped in step 1: ValueError: boom"),
    "measure": ("measure", "policy", RuntimeError("boom"), "rank 1 stopped in measure() in step 0: RuntimeError: boom"),
    "a signal": ("step", "policy", Ctrl("stop"), "rank 1 stopped in step 1: Ctrl: stop"),
    "the optimizer": ("step", "optimizer", OSError("disk\nfull"), "rank 1 stopped in step 1: OSError: disk full"),
}


CASES = [*((how, 3, "comes back") for how in STOPS), ("step", 2, "comes back"), ("step", 2, "leaves")]


def test_who_waits_for_a_rank_that_has_stopped_is_told_why_before_the_timeout(tmp_path):
    calls = [
        (without_rank_1, size, str(tmp_path / str(k)), *STOPS[how][:3], then)
        for k, (how, size, then) in enumerate(CASES)
    ]
    for case, results in zip(CASES, at_once(*calls), strict=True):
        _, _, error, why = STOPS[case[0]]
        for rank, ((first, second, *third), over) in enumerate(results):
            assert first == "right", case
            assert second == (f"{type(error).__name__}: {error}" if rank == 1 else "right"), case
            assert over, case
            for said in third:
                assert said.startswith("RuntimeError: a collective of the clipping group failed in "), case
                assert f": {why}; an error on one rank must end it, or be raised on every rank (" in said, case
        assert len(results[0][0]) == 3, case


def interrupted_before_the_message(folder: str) -> list[str]:
    """Rank 1 stops where its gradients are read, and the others wait in that very call."""
    loop, stops = Loop("gradients"), dist.get_rank() == 1
    said = [loop.said("step"), loop.said("step", Ctrl("stop") if stops else None)]
    meet(folder, dist.get_world_size())
    return said


def test_who_waits_in_the_call_that_a_rank_stopped_in_is_told_why(tmp_path):
    for rank, (first, second) in enumerate(run_ranks(interrupted_before_the_message, 3, str(tmp_path))):
        assert first == "right"
        if rank == 1:
            assert second == "Ctrl: stop"
        else:
            assert "failed in step 1: rank 1 stopped in step 1: Ctrl: stop; an error on one rank" in second


def going_on(call: str, ranks: list[int], late: float) -> list[str]:
    """These ranks raise in their second call, and all make a third, which rank 0 comes late to."""
    loop = Loop("policy")
    said = [loop.said(call), loop.said(call, ValueError("boom") if dist.get_rank() in ranks else None)]
    if dist.get_rank() == 0:
        time.sleep(late)
    return [*said, loop.said(call), loop.said(call)]


def test_where_all_have_raised_all_may_go_on_and_one_may_be_late():
    late = roll_call.LOOK * (HOPE + 2.5)
    for found in at_once(*((going_on, 3, call, [0, 1, 2], late) for call in ("clip_", "measure"))):
        assert found == [["right", "ValueError: boom", "right", "right"]] * 3


def test_a_rank_that_goes_on_where_the_others_have_stepped_disagrees_with_them():
    (_, _, told, _), (_, own, second, _) = run_ranks(going_on, 2, "clip_", [1], 0.0)
    assert own == "ValueError: boom"
    for said in (told, second):
        assert said.startswith("LayoutError: the ranks of the clipping group do not agree")


@pytest.mark.parametrize("late", [0.0, 1.2])
def test_a_rank_that_has_only_measured_may_go_on_after_a_moment(late):
    first, second = run_ranks(going_on, 2, "measure", [0], late)
    assert first == ["right", "ValueError: boom", "right", "right"]
    assert second == ["right"] * 4


def without_a_store(answers: bool) -> tuple[list[str], bool]:
    """The store is gone, or behind a link that is down, when every rank's policy raises."""
    loop = Loop("policy")
    said, gone, before = [loop.said("step")], [], time.monotonic()

    def lost() -> Any:
        gone.append(True)
        if not answers:
            time.sleep(1000)
        raise RuntimeError("no store")

    roll_call._get_default_store = lost
    return [*said, loop.said("step", ValueError("boom")), loop.said("step")], bool(gone) and time.monotonic() > before


@pytest.mark.parametrize("answers", [True, False])
def test_a_store_that_is_gone_hides_no_error_and_delays_it_for_a_moment(answers):
    for said, asked in run_ranks(without_a_store, 2, answers, fresh=True):
        assert said == ["right", "ValueError: boom", "right"]
        assert asked


def numbered() -> tuple[list[str], list[bool]]:
    """Where the next collective is looked for, and whether anybody has said there that it stopped."""
    loop = Loop("policy")
    places, posts = [following(loop.group)], []
    store = dist.distributed_c10d._get_default_store()
    for error in (None, ValueError("boom")):
        loop.said("measure", error)
        dist.barrier()  # so that both have said it
        places.append(following(loop.group))
        posts.append(store.check([f"{places[-1]}/left"]))
    return places, posts


def test_ranks_look_in_one_place_for_each_collective_and_nobody_writes_there_who_has_not_stopped():
    (places, posts), (others, _) = run_ranks(numbered, 2)
    assert places == others
    assert len(set(places)) == 3
    assert posts == [False, True]


def giving_up_at_once(folder: str) -> list[bool]:
    """Rank 1 does not come, and the others give it up at the same time, so that some connections are closed already."""
    rank, over = dist.get_rank(), []
    for again in range(25):
        group = dist.new_group(timeout=timedelta(minutes=5))
        opened = open_channel(group, 2)
        meet(f"{folder}/opened {again}", 3)  # Gloo may tell one rank of its connections before another
        if rank != 1:
            work = opened.begin(group, torch.ones(2), dist.ReduceOp.SUM)
            meet(f"{folder}/{again}", 2)
            opened.give_up()
            with suppress(RuntimeError):
                work.wait(timedelta(seconds=1))
            over.append(work.is_completed())
        meet(f"{folder}/after {again}", 3)
    return over


def test_ranks_that_give_up_at_the_same_time_leave_nothing_under_way(tmp_path):
    """In one of 15 a receive failed by the connection that the other rank had closed, and all others stayed open."""
    first, _, third = run_ranks(giving_up_at_once, 3, str(tmp_path), fresh=True)
    assert first == third == [True] * 25
