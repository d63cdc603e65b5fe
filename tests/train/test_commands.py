"""The command itself: started alone and by torchrun, stopped by signals, gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distclip import __version__
from distclip.cli import main
from distclip.train import launch
from distclip.train.stop import STOP_SIGNALS
from support.listening import LOOPBACK, descendants, listening
from train.commands import CONFIGS, ROOT, TINY, TORCHRUN, metrics, numbers, start

LONG = [*TINY, "train.steps=100000", "train.log_every=1000"]


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
PATIENCE = 200  # seconds: what takes 3 on a quiet machine has taken 60 on a busy one


@pytest.fixture
def run() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start`, and no process is left behind: SIGTERM lets the command end its ranks, which SIGKILL would not."""
    processes = []

    def started(*words: str | Path, launcher: list[str] | None = None) -> subprocess.Popen[str]:
        processes.append(start(*words, launcher=launcher))
        return processes[-1]

    yield started
    for process in processes:
        process.terminate()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, output, errors


def wait_for_steps(folder: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ((folder / "metrics.jsonl").exists() and len(metrics(folder)) >= steps):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no step was taken"
        time.sleep(0.05)


def listened(process: subprocess.Popen[str]) -> set[str]:
    """Where the process, and all that it has started, have listened by the time it ends."""
    seen: set[str] = set()
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        seen |= listening(descendants(process.pid))
        time.sleep(0.1)
    return seen


@linux
def test_the_command_starts_its_ranks_on_loopback_and_torchrun_takes_the_same_steps(run, tmp_path: Path):
    words = ["train", CONFIGS / "quickstart.yaml", *TINY, "train.steps=6", "--train.log_every=2"]
    words.append("clip.fingerprint_every=2")
    alone = run(*words, f"run.root={tmp_path}")
    under = run(*words, f"run.dir={tmp_path / 'torchrun'}", launcher=[*TORCHRUN, "2"])
    seen = listened(alone)
    code, output, errors = finish(alone)
    assert (code, errors) == (0, "")
    assert set() < seen <= LOOPBACK, "Gloo listens somewhere, or this test sees nothing"
    assert finish(under)[0] == 0
    (folder,) = tmp_path.glob("quickstart-2*")  # the name and a timestamp
    assert numbers(folder) == numbers(tmp_path / "torchrun")
    records = metrics(folder)
    assert [record["step"] for record in records if "fingerprint" in record] == [2, 4, 6]
    assert records[1]["fingerprint"] == metrics(tmp_path / "torchrun")[1]["fingerprint"]
    assert "fingerprint/head.weight" in records[5]
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "summary.json",
    ]
    assert "2 (fsdp2) on cpu, collectives by gloo" in output
    lines = [line.split()[1] for line in output.splitlines() if line.startswith("step ")]
    assert lines == ["1/6", "2/6", "4/6", "6/6"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert f"{summary['held_out_loss']:.4f}" in output
    assert f"{summary['entropy']:.4f}" in output


def test_ctrl_c_stops_all_ranks_after_the_same_step_with_a_checkpoint(run, tmp_path: Path):
    folder = tmp_path / "run"
    words = ["train", CONFIGS / "quickstart.yaml", *LONG, f"run.dir={folder}"]
    process = run(*words)
    wait_for_steps(folder, 5, process)
    os.killpg(process.pid, signal.SIGINT)
    code, output, errors = finish(process)
    assert (code, errors) == (130, "")  # torch's launcher logged into the middle of the display
    steps = [record["step"] for record in metrics(folder)]
    assert steps == list(range(1, len(steps) + 1))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{steps[-1]:08d}"]
    assert json.loads((folder / "summary.json").read_text())["status"] == "stopped by SIGINT"
    assert f"report   {folder}/report.html" in "".join(output.split("\n"))
    assert (folder / "report.html").is_file()

    (line,) = (line for line in output.splitlines() if line.startswith("go on with: "))
    command = f"{line.removeprefix('go on with: ')} train.steps={steps[-1] + 3}"
    pasted = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert (pasted.returncode, pasted.stderr) == (0, "")
    assert [record["step"] for record in metrics(folder)] == list(range(1, steps[-1] + 4))


def test_a_reader_that_has_seen_enough_ends_training_quietly_with_a_checkpoint(run, tmp_path: Path):
    folder = tmp_path / "run"
    process = run("train", CONFIGS / "quickstart.yaml", *LONG, "train.log_every=1", f"run.dir={folder}")
    first = [process.stdout.readline() for _ in range(4)]  # as `| head -4`
    process.stdout.close()
    assert all(first)
    assert (process.wait(timeout=PATIENCE), process.stderr.read()) == (129, "")
    steps = len(metrics(folder))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{steps:08d}"]


def test_what_nobody_reads_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "distclip", "bench", "--list"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_without_a_standard_output_nothing_is_printed():
    command = f"{sys.executable} -m distclip bench --list >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, "")


def blocked(pid: int) -> int:
    """The mask of signals that wait, of a process that has just begun."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk"))


@linux
@pytest.mark.parametrize("directly", [False, True], ids=["SIGTERM to the command", "Ctrl-C to its ranks"])
def test_a_signal_waits_for_ranks_that_are_still_starting(directly, run, tmp_path: Path):
    folder = tmp_path / "run"
    process = run("train", CONFIGS / "quickstart.yaml", *LONG, f"run.dir={folder}")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    waiting = sum(1 << (number - 1) for number in STOP_SIGNALS)  # just those: before it is a rank, all signals wait
    while len(ranks := children.read_text().split()) < 2 or any(blocked(int(rank)) != waiting for rank in ranks):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    for pid in map(int, ranks) if directly else [process.pid]:
        os.killpg(pid, signal.SIGINT if directly else signal.SIGTERM)
    code, _, errors = finish(process)
    aborted = directly and "killed by SIGABRT" in errors  # Gloo's threads, at a rank's very end
    assert code == (130 if directly else 143) or aborted, errors
    assert "Traceback" not in errors
    steps = len(metrics(folder))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    assert steps == 1 or not directly  # the launcher looks 10 times a second whether they train


SLOW = """
import os, signal, sys, time
from distclip.train.begun import say_begun

def save(*_):
    open(f"{sys.argv[1]}/saved-{rank}", "w").close()
    sys.exit(143)

rank = os.environ["RANK"]
open(f"{sys.argv[1]}/starting-{rank}", "w").close()
while not os.path.exists(f"{sys.argv[1]}/go"):  # a signal would be the end of it
    time.sleep(0.01)
signal.signal(signal.SIGTERM, save)
say_begun()
while True:
    time.sleep(0.01)
"""
LAUNCHER = (
    "import sys; from distclip.train import launch; launch.RANK = sys.argv[1]; "
    "sys.exit(launch.launch(2, sys.argv[2:], restarts=0))"
)


@linux
def test_no_rank_is_killed_because_it_starts_slowly(tmp_path: Path):
    """The launcher passed a signal on at once, and killed 30 s later what had not saved: at load 40, all ranks."""
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, SLOW, str(tmp_path)], env=ENVIRONMENT)
    while len(list(tmp_path.glob("starting-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    (tmp_path / "go").touch()
    assert process.wait(timeout=PATIENCE) == 143
    assert len(list(tmp_path.glob("saved-*"))) == 2


STUBBORN = (
    "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60) # rank"
)
WILLING = (
    "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep(1), sys.exit(3)));"
    "print('ready', flush=True); time.sleep(60) # rank"
)


@linux
@pytest.mark.parametrize(("rank", "patience", "code"), [(WILLING, 1000.0, 3), (STUBBORN, 0.5, -9)])
def test_ranks_that_the_launcher_does_not_know_of_yet_get_the_signal_too(rank, patience, code, monkeypatch):
    """It forgot those that it was starting when the signal came: they trained on, and the command never ended."""
    monkeypatch.setattr(launch, "RANK", rank)
    monkeypatch.setattr(launch, "SHUTDOWN", patience)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ranks = [subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.PIPE) for _ in range(2)]
    for process in ranks:
        process.stdout.readline()
    launch.end_forgotten(signal.SIGTERM)
    for process in ranks:
        process.communicate(timeout=PATIENCE)
    assert [process.returncode for process in ranks] == [code] * 2
    assert other.poll() is None, "it is no rank"
    other.kill()
    other.wait()


@linux
def test_a_rank_that_is_killed_leaves_a_whole_terminal_and_one_line():
    """Torch's launcher logged it too, and the cursor stayed hidden."""
    reader, writer = os.openpty()
    hides = "import os; print('\\033[?25l', flush=True); os.kill(os.getpid(), 9)"
    command = [sys.executable, "-c", LAUNCHER.replace("launch(2", "launch(1"), hides]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    os.close(writer)
    shown = os.read(reader, 1000)
    os.close(reader)
    assert (done.returncode, done.stderr) == (1, "distclip: rank 0 failed, killed by SIGKILL\n")
    assert shown.startswith(b"\033[?25l")
    assert shown.endswith(b"\033[?25h")


def test_a_failure_in_training_is_exit_code_1_and_one_line(run, tmp_path: Path):
    words = [*TINY, "optim.lr=1e30", "clip.nonfinite=raise", "train.steps=9", f"run.dir={tmp_path / 'run'}"]
    code, _, errors = finish(run("train", CONFIGS / "quickstart.yaml", *words))
    assert code == 1
    assert errors.count("distclip: training failed: ") == 1
    assert "Traceback" not in errors


def test_version_and_help_need_no_config(capsys: pytest.CaptureFixture[str]):
    for words in (["--version"], ["--help"], ["train", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"distclip {__version__}\n")
    for part in ("distclip train configs/quickstart.yaml", "torchrun --nproc-per-node 2", "exit codes", "143"):
        assert part in output
    assert max(map(len, output.splitlines())) <= 110
