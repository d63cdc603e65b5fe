"""The short part of the fault suite, and the judge before judges; the whole is ``tests/faults/run.sh``."""

from dataclasses import replace

import pytest

from faults.catalogue import CLEAN, FAULTS, NONFINITE, SKIPPED, cases
from faults.judge import FATE, HANG, UNNAMED, WRONG, Judge, kinds
from faults.loop import STEPS, Case, Notes
from faults.stage import End, played

pytestmark = pytest.mark.faults
SHORT = [
    Case("NaN in a gradient", "ddp", 2, "step", "skip"),
    Case("inf in a gradient", "fsdp2", 2, "function", "raise"),
    Case("rank without gradients", "fsdp2", 2, "step", "skip"),
    Case("missing gradient", "ddp", 2, "function", "propagate"),
    Case("wrong step", "fsdp2", 2, "step", "skip"),
    Case("bit flip in a parameter, verify()", "ddp", 2, "step", "skip"),
    Case("low bit flip in a gradient", "ddp", 4, "step", "skip"),
    Case("skipped call", "ddp", 2, "step", "skip", timeout=2.0),
    Case("extra call", "fsdp2", 2, "function", "skip", timeout=2.0, named=True),
    Case("exception in a backward hook", "ddp", 2, "function", "skip", named=True),
    Case("kill in mid all-reduce", "ddp", 4, "step", "skip"),
]
CASE = Case("NaN in a gradient", "ddp", 2, "step", "skip")
SAID = "blocks.0.1.weight on rank 1 has NaN in its gradient"


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_a_fault_ends_as_its_contract_says(case, judge):
    assert judge.breaches(case, played(case)) == []


def test_every_fault_is_played_on_two_sizes_with_three_policies():
    listed = cases()
    assert len(listed) == len(set(listed))
    assert {(case.fault, case.size, case.nonfinite) for case in listed} == {
        (fault, size, nonfinite) for fault in FAULTS for size in (2, 4) for nonfinite in NONFINITE
    }


# ---- the judge, with ends that nobody played ----------------------------------------------------------------


class Told(Judge):
    """A judge who is told how the loop ends without the fault."""

    def _without(self, control: str, case: Case) -> list[End]:
        return [skipped()] * case.size


def skipped(**changes) -> End:
    notes = Notes("finished", norms=["0x1p+0", "nan", "0x1p+0", "0x1p+0"], squares=[0.5, float("nan"), 0.5, 0.5])
    return End("finished", replace(notes, clipped=STEPS - 1, said=[SAID], parameters="right", **changes), 0.1)


def end(fate: str, message: str = "", seconds: float = 0.1) -> End:
    return End(fate, Notes(fate, message), seconds)


BAD = {
    "parameters of one rank are others": ([skipped(), skipped()], WRONG),
    "a rank that made fewer steps": ([skipped(), end("finished")], WRONG),
    "a norm of other bits": ([skipped(), skipped()], WRONG),
    "a rank that raises alone": ([skipped(), end("NonFiniteError", SAID)], FATE),
    "a rank that hangs": ([skipped(), end("hung")], HANG),
    "an error that comes too late": ([skipped(), end("NonFiniteError", SAID, seconds=10.1)], HANG),
    "no word of the culprit": ([skipped(), skipped()], UNNAMED),
    "a rank that dies": ([skipped(), end("died of SIGABRT")], FATE),
}
BAD["parameters of one rank are others"][0][1].notes.parameters = "wrong"
BAD["a norm of other bits"][0][1].notes.norms[2] = "0x1.0000000000001p+0"
BAD["no word of the culprit"][0][0].notes.said = ["blocks.0.1.weight on rank 0 has NaN in its gradient"]


def test_the_judge_lets_pass_what_is_right():
    assert Told().breaches(CASE, [skipped(), skipped()]) == []


@pytest.mark.parametrize("what", BAD)
def test_the_judge_finds(what):
    ends, kind = BAD[what]
    assert kind in kinds(Told().breaches(CASE, ends))


def test_the_judge_finds_a_rank_that_goes_on_where_all_must_raise():
    case = replace(CASE, nonfinite="raise")
    assert kinds(Told().breaches(case, [end("NonFiniteError", SAID), skipped()])) >= {WRONG}


def test_the_judge_finds_that_nothing_was_clipped():
    dull = [skipped(), skipped()]
    for each in dull:
        each.notes.clipped = 0
    assert kinds(Told().breaches(CASE, dull)) == {WRONG}


@pytest.mark.parametrize("control", [CLEAN, SKIPPED])
def test_the_loop_without_a_fault_clips_and_ends_alike_on_both_ranks(control):
    ends = played(replace(CASE, fault=control))
    assert [each.fate for each in ends] == ["finished"] * 2
    assert ends[0].notes.parameters == ends[1].notes.parameters
    assert ends[0].notes.clipped >= STEPS - 2
