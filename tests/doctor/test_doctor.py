"""`distclip doctor`: all is well on healthy ranks, and what is wrong on one of them is named, with exit code 1."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from distclip.cli import main
from distclip.doctor.subjects import LAYOUTS
from support.programs import play
from support.ranks import LIMIT

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT), str(ROOT / "tests")]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
QUICK = ["--parameters", "30000", "--timeout", "20"]
PROGRAM = """\
import os, sys
import torch
import torch.distributed as dist
RANK = int(os.environ.get("RANK", 0))
{before}
from distclip.cli import main
sys.exit(main({words!r}))
"""


def ranks_of(folder: Path, *words: str, before: str = "", ranks: int = 2) -> tuple[list[int], str]:
    """Exit codes and all output of ``distclip <words>`` on the ranks of a launcher."""
    program = folder / "program.py"
    program.write_text(PROGRAM.format(before=before, words=[*map(str, words)]))
    return play(program, ranks, PATHS, LIMIT)


def line_of(output: str, name: str) -> str:
    return next(line for line in output.splitlines() if line[7:].startswith(name))


def checks_in(text: str) -> list[str]:
    """Marks and names of the checks that are shown."""
    return [" ".join(found) for found in re.findall(r"^ *(ok|-) {5,}(\S+(?: \S+)*)", text, re.MULTILINE)]


# ---- healthy ranks -----------------------------------------------------------------------------------------


def test_all_is_well_on_four_ranks_on_every_layout(tmp_path: Path):
    target = tmp_path / "found.json"
    codes, output = ranks_of(tmp_path, "doctor", *QUICK, "--model", "doctor.mine:sharded", "--json", target, ranks=4)
    assert codes == [0] * 4, output
    document = json.loads(target.read_text())
    found = {each["name"]: each for each in document["findings"]}
    assert document["ok"]
    assert {each["state"] for each in found.values()} == {"ok"}
    assert set(found) == {"versions", "collectives", "latency", "kernels", *LAYOUTS, "speed", "your model"}
    for name in LAYOUTS:
        facts = found[name]["facts"]
        assert facts["norm"] == pytest.approx(facts["oracle"], rel=1e-5)
        assert facts["after"] == pytest.approx(0.5 * facts["oracle"], rel=1e-5)
    assert found["latency"]["facts"]["all_reduce_ms"]["2"] > 0
    assert found["speed"]["facts"]["ratio"] > 0
    assert line_of(output, "your model").endswith("the same bits on all")
    assert line_of(output, "DDP").split()[-1] == "right"
    if torch.__version__.startswith("2.13"):
        assert "by rank" in line_of(output, "FSDP1")
        assert "raises RuntimeError" in line_of(output, "FSDP2 x TP")
        assert "by rank" in line_of(output, "pipeline stages")
    assert output.splitlines()[-1].startswith("All is well: 14 checks in")
    assert "Warning" not in output


# ---- a rank that is not as the others ----------------------------------------------------------------------


def test_another_torch_on_one_rank_is_named(tmp_path: Path):
    before = "if RANK == 1: torch.__version__ = '2.6.0'"
    codes, output = ranks_of(tmp_path, "doctor", *QUICK, before=before)
    assert codes == [1, 1]
    assert "WRONG  versions         rank 1: torch 2.6.0, the others have" in output
    assert output.splitlines()[-1].startswith("Wrong: versions")


def test_a_backend_that_cannot_begin_is_named(tmp_path: Path):
    before = "if RANK == 1: os.environ['GLOO_SOCKET_IFNAME'] = 'nowhere'"
    codes, output = ranks_of(tmp_path, "doctor", "--timeout", "3", before=before)
    assert codes == [1, 1]
    wrong = line_of(output, "collectives")
    assert "rank 1: " in wrong
    assert "nowhere" in wrong


def test_another_model_on_one_rank_is_named(tmp_path: Path):
    words = ["doctor", *QUICK[:2], "--timeout", "4", "--model", "doctor.mine:another_ddp_on_rank_1"]
    skip = "from distclip.doctor import subjects\nsubjects.LAYOUTS.clear()"
    codes, output = ranks_of(tmp_path, *words, before=skip)
    assert codes == [1, 1], output
    said = "rank 1: RuntimeError: doctor.mine:another_ddp_on_rank_1() of --model raised RuntimeError: "
    assert said in line_of(output, "your model")
    assert "doctor/mine.py:" in line_of(output, "your model")


# ---- alone -------------------------------------------------------------------------------------------------


def start(*words: str, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "distclip", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def children_of(process: subprocess.Popen[str]) -> list[str]:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def test_torchrun_starts_it():
    well = start("doctor", *QUICK, launcher=TORCHRUN)
    output, errors = well.communicate(timeout=LIMIT)
    assert well.returncode == 0, errors
    assert output.splitlines()[-1].startswith("All is well: 11 checks in ")
    page = (ROOT / "docs/howto/doctor.md").read_text(encoding="utf-8")
    assert checks_in(page) == checks_in(output) != []


def plan_of(folder: Path, *words: str) -> tuple[int, str]:
    """The exit code of ``distclip inspect`` with two processes that this one starts, and what it says of the plan."""
    code = main(["inspect", "--processes", "2", "--json", str(folder / "found.json"), *words])
    found = {each["name"]: each for each in json.loads((folder / "found.json").read_text())["findings"]}["plan"]
    return code, f"{found['state']}: {found['text']}"


def test_alone_it_starts_two_processes_and_names_one_that_dies(capsys, tmp_path: Path):
    code, said = plan_of(tmp_path, "--model", "doctor.mine:dies_on_rank_1")
    assert code == 1
    assert said.startswith("wrong: rank 1 does not answer")
    assert capsys.readouterr().err == "distclip: rank 1 was killed by SIGKILL\n"


def test_alone_a_rank_that_hangs_is_named_and_ended(capsys, tmp_path: Path):
    before = multiprocessing.active_children()  # ranks of other tests
    code, said = plan_of(tmp_path, "--timeout", "3", "--model", "doctor.mine:hangs_on_rank_1")
    assert (code, capsys.readouterr().err) == (1, "")
    assert said.startswith("wrong: rank 1 does not answer")
    assert {*multiprocessing.active_children()} <= {*before}


def test_sigint_to_the_command_alone_ends_its_ranks_quietly():
    process = start("doctor", "--timeout", "100", "--model", "doctor.mine:hangs_on_rank_1")
    try:
        assert process.stdout.readline().startswith("ok     versions")  # its ranks have met
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, errors) == (130, "")


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["doctor", "--processes", "0"], "--processes must be from 1 to"),
        (["doctor", "--timeout", "-1"], "--timeout must be above 0 seconds, not -1"),
        (["doctor", "--parameters", "0"], "--parameters must be at least 1, not 0"),
        (["doctor", "--json", "nowhere/found.json"], "--json: nowhere/found.json cannot be written"),
        (["doctor", "--frobnicate"], "doctor does not know --frobnicate"),
        (["doctor", "--model", "mine"], "--model: 'mine' is not of the form package.module:function"),
        (["inspect"], "the following arguments are required: --model"),
    ],
)
def test_a_bad_argument_is_one_line_and_code_2(words, said, capsys, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    output, errors = capsys.readouterr()
    assert (code, output) == (2, "")
    assert errors.startswith(f"distclip: {said}")
    assert errors.count("\n") == 1


def test_a_full_disk_is_one_line_and_code_2_and_the_other_rank_ends_as_well(tmp_path: Path):
    full = "if RANK == 0: os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"
    codes, output = ranks_of(tmp_path, "doctor", *QUICK, before=full)
    assert codes == [2, 0], output
    assert output.count("distclip: ") == output.count("distclip: cannot write: No space left on device") == 1
    assert "Traceback" not in output


def test_a_rank_that_is_no_number_is_one_line_and_code_2(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("distclip: RANK: a launcher puts a number there, not 'first'")


def test_a_store_that_cannot_be_reached_is_one_line(tmp_path: Path):
    lost = (
        "import os; os.environ['MASTER_PORT'] = '1'\nfrom distclip.doctor import meeting, place\nplace.STARTING = 2.0"
    )
    codes, output = ranks_of(
        tmp_path, "inspect", "--timeout", "2", "--model", "doctor.mine:layers", before=lost, ranks=1
    )
    assert codes == [1]
    assert "distclip: rank 0 cannot reach the store where ranks meet: " in output
    assert "Traceback" not in output


def test_sigterm_ends_it_without_a_verdict(tmp_path: Path):
    stop = """
import signal
from distclip.doctor import collectives
def run(site):
    signal.raise_signal(signal.SIGTERM)
    return {"wrong": {}}
collectives.run = run
"""
    codes, output = ranks_of(tmp_path, "doctor", before=stop, ranks=1)
    assert codes == [143]
    assert "All is well" not in output


def test_a_function_that_returns_no_module_is_one_line_and_code_2(tmp_path: Path):
    codes, output = ranks_of(tmp_path, "inspect", "--model", "doctor.mine:a_number")
    assert codes == [2, 2]
    assert output.startswith("distclip: --model: doctor.mine:a_number() returned int, not a module")
    assert output.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")
def test_ctrl_c_while_ranks_are_starting_is_quiet_too():
    process = start("doctor")
    while len(children_of(process)) < 2:  # multiprocessing's own, and the one that ranks are forked from
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, output, errors) == (130, "", "")
