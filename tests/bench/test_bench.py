"""`distclip bench`: its arithmetic on known numbers, its table, its command, and one case on real ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from math import inf, sqrt
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import distclip
from distclip.bench.case import Case, Contest
from distclip.bench.cases import CASES, chosen, unknown
from distclip.bench.place import Place
from distclip.bench.result import Result, summary
from distclip.bench.rounds import kibibytes, measure, peak, play
from distclip.bench.subject import FreshDTensors, ddp
from distclip.bench.table import figure, line
from distclip.cli import main
from distclip.kernels import native
from house.test_floors import files, imports
from support import programs
from support.ranks import LIMIT, run_ranks

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def nothing(place: Place) -> Contest:
    return Contest(calls={}, prepare=lambda: None, norm=1.0, max_norm=0.1)


CASE = Case(name="tiny", what="a case of tests", build=nothing, goal=2.0, rounds=4, warmups=1)
AT_MOST = replace(CASE, at_most=True, over=("distclip", "torch"))


# ---- arithmetic --------------------------------------------------------------------------------------------


def test_the_ratio_is_the_median_of_the_ratios_of_each_round():
    result = summary(CASE, {"torch": [1.0, 8.0, 9.0], "distclip": [1.0, 2.0, 9.0]})
    assert result.medians == {"torch": 8.0, "distclip": 2.0}
    assert result.ratio == 1.0  # of 1, 4, 1; the medians' own ratio would be 4
    assert (result.low, result.high, result.rounds) == (1.0, 2.5, 3)


def test_one_round_is_its_own_quartiles():
    result = summary(CASE, {"torch": [6.0], "distclip": [2.0]})
    assert (result.low, result.ratio, result.high, result.rounds) == (3.0, 3.0, 3.0, 1)


def test_a_goal_is_a_floor_or_a_ceiling():
    times = {"torch": [3.0], "distclip": [1.0]}
    assert summary(CASE, times).to_dict()["met"] is True
    assert summary(AT_MOST, times).to_dict() | {"note": ""} == {
        "case": "tiny",
        "what": "a case of tests",
        "torch_ms": 3.0,
        "distclip_ms": 1.0,
        "ratio": 1 / 3,
        "low": 1 / 3,
        "high": 1 / 3,
        "rounds": 1,
        "over": ["distclip", "torch"],
        "goal": 2.0,
        "at_most": True,
        "met": True,
        "note": "",
    }
    assert summary(CASE, {"torch": [1.9], "distclip": [1.0]}).to_dict()["met"] is False


def test_a_line_shows_the_ratio_its_goal_and_what_it_was_made_of():
    result = summary(CASE, {"torch": [9.0], "distclip": [4.5], "clipper": [300.4]})
    shown = " ".join(line(result, 4).split())
    assert shown == "tiny 2.00 2.00 .. 2.00 >= 2 met torch 9.00 ms / distclip 4.50 ms, clipper 300 ms"
    assert " ".join(line(Result(case=AT_MOST, note="not built: yet"), 4).split()) == "tiny - <= 2 not built: yet"


def test_a_case_without_a_goal_is_neither_met_nor_missed():
    result = summary(replace(AT_MOST, goal=None), {"torch": [1.0], "distclip": [2.0]})
    assert (result.to_dict()["goal"], result.to_dict()["met"]) == (None, None)
    assert " ".join(line(result, 4).split()) == "tiny 2.00 2.00 .. 2.00 distclip 2.00 ms / torch 1.00 ms"


@pytest.mark.parametrize("case", chosen(["watch", "by"]), ids=lambda case: case.name)
def test_cases_of_finer_norms_stand_beside_a_clipper_that_needs_none(case):
    assert case.over == ("distclip", "clipper")
    assert case.at_most


@pytest.mark.parametrize(("value", "text"), [(0.04567, "0.0457"), (9.5, "9.50"), (99.96, "100."), (3012.6, "3013")])
def test_figures_have_three_digits(value, text):
    assert figure(value) == text


def test_the_peak_is_the_highest_running_sum():
    assert peak([]) == 0
    assert peak([-8, 4]) == 0
    assert peak([8, 8, -8, 4, -12]) == 16


def test_memory_counts_what_is_held_at_one_time():
    def call() -> torch.Tensor:
        first = torch.empty(1024, dtype=torch.float64)
        del first
        second, third = torch.empty(1024), torch.empty(512)
        return second[0] + third[0]

    assert kibibytes(call, CPU)[0] == 8.0


# ---- the table ---------------------------------------------------------------------------------------------


def test_the_names_of_cases_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_ratio_is_of_two_different_quantities_one_of_them_ours():
    for case in CASES:
        assert len(set(case.over)) == 2, case.name
        assert "distclip" in case.over, case.name


def test_a_word_chooses_a_case_or_those_whose_names_begin_with_it():
    assert [case.name for case in chosen(["cold", "plain"])] == ["cold", "plain-unclipped", "plain-clipped"]
    assert [case.name for case in chosen(["plain-clipped"])] == ["plain-clipped"]
    assert chosen([]) == CASES
    assert unknown(["cold", "plain", "pla", "warm"]) == ["pla", "warm"]


def test_bench_imports_torch_python_and_public_names_alone():
    allowed = {"torch"} | sys.stdlib_module_names
    public = {name for name in vars(distclip) if not name.startswith("_")}
    foreign = [
        f"{path} imports {'.'.join([first, *rest])}"
        for path, _, nodes in files({"bench"})
        for first, *rest in imports(path, nodes)
        if not (first in allowed or (first == "distclip" and (not rest or rest[0] == "bench" or rest[0] in public)))
    ]
    assert not foreign, "\n".join(foreign)


# ---- rounds ------------------------------------------------------------------------------------------------


def turns(alone: bool) -> tuple[list[str], dict[str, list[float]]] | None:
    """What is called on this rank, and how long each call took."""
    place = Place.here(CPU)
    called: list[str] = []

    def call(name: str, seconds: float) -> None:
        called.append(name)
        time.sleep(seconds)

    calls = {"torch": partial(call, "T", 0.01 * place.rank), "distclip": partial(call, "D", 0.0)}
    prepare = partial(called.append, "-")
    contest = Contest(
        calls=calls, prepare=prepare, norm=1.0, max_norm=1.0, group=place.alone if alone else None, constants={"k": 5.0}
    )
    if alone and place.rank:
        return None
    return called, play(CASE, contest, CPU, 4)


def test_calls_take_turns_and_the_slowest_rank_counts():
    (called, quantities), (_, others) = run_ranks(turns, 2, False)
    assert "".join(called) == "-D-T" + "-T-D-D-T-T-D-D-T"  # a warm-up, then four rounds
    assert quantities == others
    assert quantities["k"] == [5.0] * 4
    assert len(quantities["torch"]) == len(quantities["distclip"]) == 4  # the warm-up is not counted
    assert min(quantities["torch"]) >= 10.0  # rank 1 sleeps for 10 ms


def test_rank_0_alone_waits_for_nobody():
    (called, quantities), nothing = run_ranks(turns, 2, True)
    assert nothing is None
    assert len(called) == 20
    assert len(quantities["torch"]) == 4


def test_gradients_that_were_clipped_already_are_noticed():
    contest = Contest(calls={}, prepare=lambda: None, norm=1.0, max_norm=0.1)
    contest.check(torch.tensor(1.0))
    contest.check(None)
    with pytest.raises(AssertionError, match=r"gradients of norm 0\.1"):
        contest.check(torch.tensor(0.1))


def new_sets() -> list[tuple[int, int, float]]:
    """Number and size of tensors and norm of two sets."""
    sets = FreshDTensors(Place.here(CPU), 3)
    found = []
    for _ in range(2):
        sets.renew()
        norm = distclip.clip_grad_norm_(sets.parameters, inf).item()
        found.append((len(sets.parameters), sets.parameters[0].numel(), norm))
    return found


def test_cold_sets_differ_in_number_and_shape_and_have_norm_1():
    for tensors in run_ranks(new_sets, 2):
        assert tensors == [(4, 10, pytest.approx(1.0)), (5, 12, pytest.approx(1.0))]


def fresh_gradients() -> list[float]:
    subject = ddp(Place.here(CPU), matrices=3, width=4, views=True)
    norms = []
    for _ in range(2):
        subject.backward()
        norms.append(sqrt(sum(p.grad.square().sum().item() for p in subject.parameters)))
        distclip.clip_grad_norm_(subject.parameters, norms[0] / 10)
    return norms


def test_every_backward_makes_the_same_gradients():
    (first, second), others = run_ranks(fresh_gradients, 2)
    assert first == second > 0
    assert others == [first, second]


def not_built() -> Result | None:
    def build(place: Place) -> Contest:
        raise NotImplementedError("no such kernel yet")

    place = Place.here(CPU)
    dist.barrier()
    return measure(replace(CASE, build=build), place, 2).to_dict()


def test_what_is_not_built_is_said():
    for found in run_ranks(not_built, 2):
        assert found["note"] == "not built: no such kernel yet"
        assert found["ratio"] is found["met"] is None


# ---- the command -------------------------------------------------------------------------------------------


def outcome(*words: str | Path) -> int:
    """The exit code, however it is said."""
    try:
        return main(["bench", *map(str, words)])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["warm"], "no case is called 'warm': distclip bench --list names them"),
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--rounds", "many"], "argument --rounds: invalid int value: 'many'"),
        (["--processes", "0"], "--processes must be at least 1, not 0"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--json", "nowhere/figures.json"], "--json: nowhere/figures.json cannot be written"),
        (["--json", "."], "--json: . cannot be written"),
        (["--json", "x" * 300], f"--json: {'x' * 300} cannot be written"),
        (["--frobnicate"], "bench does not know --frobnicate"),
    ],
)
def test_a_bad_argument_is_one_line_and_code_2(words, said, capsys, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert outcome(*words) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"distclip: {said}")
    assert errors.count("\n") == 1


def test_missing_gpus_are_one_line_and_code_2(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert outcome("--device", "cuda") == 2
    assert capsys.readouterr().err == "distclip: --device cuda: 2 processes need as many GPUs, this machine has 1\n"


def test_the_list_names_every_case_and_measures_nothing(capsys):
    assert outcome("--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [case.name for case in CASES]


def start(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "distclip", "bench", *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_a_case_is_measured_on_local_ranks_and_on_those_of_a_launcher(tmp_path: Path):
    words = ["ddp-small-function", "--rounds", "2", "--json"]
    local = start(*words, tmp_path / "2.json")
    program = tmp_path / "program.py"
    command = ["bench", *words, str(tmp_path / "1.json")]
    program.write_text(f"import sys\nfrom distclip.cli import main\nsys.exit(main({command!r}))\n")
    codes, launched = programs.play(program, 1, [str(ROOT)], LIMIT)
    said, errors = local.communicate(timeout=LIMIT)
    assert (local.returncode, codes) == (0, [0]), errors + launched
    for output, world in [(said, 2), (launched, 1)]:
        assert [row.split()[0] for row in output.splitlines()] == ["case", "ddp-small-function"]
        document = json.loads((tmp_path / f"{world}.json").read_text())
        machine, (case,) = document["machine"], document["cases"]
        assert (machine["world"], machine["threads"]) == (world, 1)
        assert machine["sums"] == native.name()
        assert (machine["torch"], machine["distclip"]) == (torch.__version__, distclip.__version__)
        assert machine["command"] == " ".join(["distclip", "bench", *words, str(tmp_path / f"{world}.json")])
        assert (case["case"], case["rounds"], case["note"]) == ("ddp-small-function", 2, "")
        assert 0 < case["low"] <= case["ratio"] <= case["high"]
        assert case["torch_ms"] > 0
        assert case["distclip_ms"] > 0


@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["in the terminal", "to the command alone"])
def test_ctrl_c_ends_it_quietly(send):
    process = start("ddp-small-function", "--rounds", "10000", "--processes", "1")
    try:
        assert process.stdout.readline().split()[0] == "case"  # its rank has begun
        send(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, errors) == (130, "")
